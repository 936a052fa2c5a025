"""Weights on disk: whole or not at all, tied names, and only into the model they belong to."""

import pytest
import torch
from torch import nn

import epochal
from epochal.checkpoint.store import Checkpoints
from epochal.checkpoint.weights import load_into, load_weights, save_weights


def result():
    X = torch.randn(20, 3)
    return epochal.fit(nn.Linear(3, 1), (X, X[:, :1]), loss="mse", epochs=1, observers=())


def test_plain_torch_reads_what_save_wrote(tmp_path):
    done = result()
    done.save(tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=True)["weight"], done.model.weight)
    done.save(str(tmp_path / "model.safetensors"))
    assert torch.equal(load_weights(tmp_path / "model.safetensors")["weight"], done.model.weight)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_save_where_it_cannot_be(tmp_path, name):
    done = result()
    with pytest.raises(epochal.EpochalError) as caught:
        done.save(tmp_path / "nowhere" / name)
    assert caught.value.describe() == (
        f"FileError: {name} cannot be written: its folder does not exist.\n"
        f"  where: {tmp_path}/nowhere/{name}\n"
        "  fix:   make the folder first"
    )
    (tmp_path / "file").touch()
    with pytest.raises(epochal.EpochalError, match="cannot be written"):
        done.save(tmp_path / "file" / name)


def test_types_shapes_and_ties_survive(tmp_path):
    shared = torch.randn(4, 4)
    weights = {
        "a": shared, "b": shared, "part": shared[1:], "transposed": torch.randn(3, 2).t(), "empty": torch.zeros(0, 3),
        "half": torch.randn(2).half(), "bf16": torch.randn(2).bfloat16(), "whole": torch.arange(3),
        "complex": torch.randn(2, dtype=torch.complex64), "truth": torch.tensor([True, False]),
        "scalar": torch.tensor(1.5),
    }  # fmt: skip
    save_weights(weights, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == weights.keys()
    for name, value in weights.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


def test_what_is_no_tensor_is_refused(tmp_path):
    with pytest.raises(epochal.EpochalError) as caught:
        save_weights({"extra": {"a": 1}}, tmp_path / "w.safetensors")
    assert caught.value.describe() == (
        "CheckpointError: a dict cannot be kept in a safetensors file.\n"
        "  where: entry 'extra' of the state dict\n"
        '  fix:   keep it out of get_extra_state(), or use torch\'s own format: result.save("model.pt")'
    )
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights({"a": torch.ones(2, 3), "b": torch.arange(4)}, path)
    whole = path.read_bytes()
    found, expected = set(), load_weights(path)
    for bit in range(8 * len(whole)):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        try:
            loaded = load_weights(path)
        except epochal.CheckpointError:
            found.add(bit)
        else:  # the name of the digest, say: then it is only not looked at
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert len(found) > 6 * len(whole)


def test_weights_of_another_model_change_nothing():
    model = nn.Linear(3, 1)
    before = model.weight.clone()
    with pytest.raises(epochal.EpochalError) as caught:
        load_into(model, {"weight": torch.zeros(2, 3), "scale": torch.ones(1)}, "w.safetensors")
    assert caught.value.describe() == (
        "CheckpointError: these weights belong to another model.\n"
        "  where: w.safetensors; missing: bias; unexpected: scale; of another shape: weight (2, 3) for (1, 3)\n"
        "  fix:   build the model as it was when they were saved"
    )
    with pytest.raises(epochal.EpochalError, match=r"weight int for \(1, 3\)"):
        load_into(model, {"weight": 5, "bias": torch.zeros(1)}, "w")
    assert torch.equal(model.weight, before)


def test_a_file_that_is_no_safetensors(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(epochal.EpochalError, match="it is not a safetensors file"):
        load_weights(tmp_path / "w.safetensors")


def test_a_damaged_checkpoint_is_told(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, {"w": torch.ones(100)})
    data = bytearray((path / "tensors-00000.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "tensors-00000.safetensors").write_bytes(data)
    with pytest.raises(epochal.EpochalError, match=r"damaged: tensors-00000\.safetensors is not what was written"):
        checkpoints.load(path)


def test_lazy_conjugates_are_not_taken_for_one_another(tmp_path):
    weights = {f"w{i}": torch.full((64, 64), complex(i, 1.0)).mH for i in range(4)}
    weights |= {"same": weights["w2"], "neg": weights["w3"].imag, "plain": weights["w1"].conj()}
    save_weights(weights, "c.safetensors")
    found = load_weights("c.safetensors")
    assert all(torch.equal(found[name], value.resolve_conj().resolve_neg()) for name, value in weights.items())
    assert found["same"] is found["w2"]
