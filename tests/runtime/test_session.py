"""What a session shows of itself in a notebook, and what stages may keep in a call."""

import pytest
import torch

import regard
from regard.lens import Entropy, ResidualNorm, Sinks
from regard.runtime import Lens
from regard.runtime.edits import ForceAttention
from tests.support.families import FAMILIES

IDS = torch.arange(5, 14)[None]


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("eager")


def test_a_notebook_shows_every_result_in_order(llama):
    with torch.no_grad(), regard.watch(llama, Entropy(), ResidualNorm(), Sinks(name="<first>")) as seen:
        llama(IDS)
    shown = seen._repr_html_()
    assert shown.index("Entropy") < shown.index("largest_other") < shown.index("&lt;first&gt;")
    assert shown.count("<table") > 3 and "<first>" not in shown


def test_a_notebook_shows_what_is_not_there_yet(llama):
    with torch.no_grad(), regard.watch(llama, Entropy(), Sinks()) as seen:
        assert "Entropy has seen nothing" in seen._repr_html_()
        llama(IDS)
    assert "nothing" not in seen._repr_html_()


def test_a_notebook_shows_a_session_without_lenses(llama):
    with torch.no_grad(), regard.steer(llama, ForceAttention([(0, 1)], to="first")) as seen:
        llama(IDS)
    assert "ForceAttention" in seen._repr_html_()


class Gather(Lens):
    """Keeps the whole matrix in the call until its end, as a lens of a user's own may."""

    def weights(self, block):
        call = block.call
        store = call.extra.setdefault("gathered", torch.zeros(1, 4, call.query_length, call.key_length))
        store[:, :, block.start : block.stop, block.key_start : block.key_stop] = block.weights

    def end_call(self, call):
        self.tally.append(call.site, "gathered", call.extra["gathered"])

    def result(self):
        return self.tally.get("gathered")


def test_what_a_lens_keeps_in_a_call_before_edits_stays_apart(llama):
    edit = ForceAttention([(0, head) for head in range(4)], to="self")
    lenses = (Gather(name="before", before=True), Gather(name="after"))
    with torch.no_grad():
        plain = llama(IDS, output_attentions=True).attentions
        with regard.steer(llama, edit, *lenses) as seen:
            llama(IDS)
    torch.testing.assert_close(seen["before"]["text.0"][0], plain[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen["after"]["text.0"][0], torch.eye(9).expand(1, 4, 9, 9))
