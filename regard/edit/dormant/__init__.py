"""Active-dormant heads, by intervention: heads put out, sent to the sink, or either where they idle."""

from regard.edit.dormant.gate import EntropyGate, silence
from regard.edit.dormant.losses import forced_losses
from regard.edit.dormant.origin import sink_origin

__all__ = ["EntropyGate", "forced_losses", "silence", "sink_origin"]
