"""Every causal type of transformers as a tiny random model.

`settings.yaml` holds what each type needs, `configuration` applies it, `building` makes and saves the model, `kinds`
measures whether it is a decoder at all.
"""
