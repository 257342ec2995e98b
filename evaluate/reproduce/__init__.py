"""The whole programme of experiments in one resumable command, and an analysis that answers its questions.

A store (made, or one that is there) -> `places` and `programme`, what to run -> `running`, which runs commands -> run
directories -> `evidence`, figures read from their files -> `answers` -> `analysis`, the Markdown. `whole` is all of it.
Nothing is measured here; whatever is said can be traced to a file that a command wrote.
"""

from evaluate.reproduce.places import LAYERS
from evaluate.reproduce.programme import Scale
from evaluate.reproduce.whole import Corpus, commands, describe, describe_commands, parse_scale, reproduce

__all__ = ["LAYERS", "Corpus", "Scale", "commands", "describe", "describe_commands", "parse_scale", "reproduce"]
