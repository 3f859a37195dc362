"""The probe of a packed model. tests/training/test_planned_batches.py shows that a run makes it."""

from __future__ import annotations

import pytest
from architectures import ATTENTIONS, build_model

from trainers.config.errors import ConfigError
from trainers.model.isolation_probe import probe


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_probe_accepts_isolated_documents(attention):
    assert probe(build_model("llama", attention)) < 1e-5


def test_the_probe_stops_a_run_whose_documents_see_each_other():
    model = build_model("llama", "documents")
    forward = model.model.forward

    def contaminated(*args, position_ids=None, cu_seq_lens_q=None, **kwargs):
        return forward(*args, **kwargs)

    model.model.forward = contaminated
    with pytest.raises(ConfigError, match="two documents of one sequence see each other"):
        probe(model)
