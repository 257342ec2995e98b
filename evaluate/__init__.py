"""Full models, only at the end: mapped states are injected, text is generated, and controls say what it means.

The import name is shared with a Hugging Face package; both cannot live in one environment (`featstore doctor` looks).
"""
