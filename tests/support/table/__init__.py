"""The table of all causal types: measured, held against the truth, counted, written down.

`measuring` makes a row of the probe's verdict, `agreeing` says where the truth disagrees with it, `hidden` is its own
two-prompt check, `recorded` reads and writes ``docs/models.json``, `counting` and `page` make ``docs/models.md`` of it.
"""
