"""Combinations that cannot run are refused from their values, each with what to change."""

import dataclasses

import pytest

from internjax.model.config import INTERNLM2_7B, INTERNLM2_20B, LinearScaling, NoScaling
from internjax.sharding import MeshConfig
from internjax.train.checks import check_run
from internjax.train.optimizer import WSD, Cosine

GOOD = dict(model=INTERNLM2_7B, mesh=MeshConfig(fsdp=16, tensor=4), num_devices=64, batch_size=64, seq_len=4096)


def checked(**changes):
    values = GOOD | changes
    check_run(values.pop("model"), **values)


def test_what_fits_passes():
    checked()
    checked(accumulate=4, schedule=Cosine(10), num_steps=10)
    checked(model=INTERNLM2_20B, mesh=MeshConfig(fsdp=8, sequence=2, tensor=4), seq_len=32768)
    checked(model=dataclasses.replace(INTERNLM2_7B, rope_scaling=LinearScaling(2.0)), seq_len=65536)
    checked(mesh=MeshConfig(), num_devices=1, batch_size=3, seq_len=1001)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_devices": 63}, "does not fit 63 devices"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"batch_size": 40}, r"40 rows.*data 1 x fsdp 16 x accumulate 1 = 16.*batch_size to 32 or 48"),
        ({"batch_size": 8, "accumulate": 2}, r"= 32 equal parts\. Set batch_size to 32"),
        ({"mesh": MeshConfig(sequence=3), "num_devices": 48}, "4096 tokens cannot be cut over sequence 3"),
        ({"mesh": MeshConfig(fsdp=4, tensor=16)}, r"tensor 16.*num_kv_heads 8\. Set mesh.tensor to a divisor of 8"),
        ({"mesh": MeshConfig(fsdp=3), "num_devices": 3, "batch_size": 3}, r"fsdp 3.*d_model 4096\. .* divisor of 4096"),
        ({"seq_len": 65536}, r"65536 tokens.*max_position_embeddings 32768.*NTK.*seq_len to 32768.*rope_theta"),
        ({"seq_len": 40000, "model": dataclasses.replace(INTERNLM2_7B, rope_scaling=NoScaling())}, "has no scaling"),
        (
            {"seq_len": 65552, "model": dataclasses.replace(INTERNLM2_7B, rope_scaling=LinearScaling(2.0))},
            r"factor 2.0.*seq_len to 65536",
        ),
        ({"schedule": Cosine(11), "num_steps": 10}, "warms up for 11 of 10"),
        ({"schedule": WSD(5, decay_steps=6), "num_steps": 10}, "together more than the run's 10"),
        (
            {"model": dataclasses.replace(INTERNLM2_7B, attention="ring"), "mesh": MeshConfig(), "num_devices": 1},
            "there is one device. Set attention to chunked",
        ),
        (
            {"model": dataclasses.replace(INTERNLM2_7B, attention="cudnn"), "mesh": MeshConfig(fsdp=32, sequence=2)},
            "cudnn works on whole rows",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        checked(**changes)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ValueError) as refused:
        checked(batch_size=40, seq_len=65536, schedule=Cosine(11), num_steps=10)
    assert str(refused.value).startswith("3 things do not fit together:\n- ") and str(refused.value).count("\n- ") == 3
