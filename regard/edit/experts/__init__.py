"""Experts of mixture-of-experts models: which fire for a behaviour, and turning them off, on or down."""

from regard.edit.experts.difference import ExpertTable, control_experts, differential
from regard.edit.experts.recording import record_experts
from regard.edit.experts.steering import TuneExperts
from regard.edit.experts.tuning import tune_experts

__all__ = ["ExpertTable", "TuneExperts", "control_experts", "differential", "record_experts", "tune_experts"]
