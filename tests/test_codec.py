"""The codec gives back what it took, to the bit, refuses what it cannot keep, and trusts no file."""

import enum
import json
import random
import struct
from collections import Counter, OrderedDict, UserDict, defaultdict, namedtuple

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from epochal.checkpoint.codec import decode, dumps, encode, loads
from epochal.errors import CheckpointError
from epochal.runtime import seeding


def through(state):
    """There and back, by way of the bytes of both files. The file of tensors itself refuses shared memory."""
    tree, tensors = encode(state)
    return decode(loads(dumps(tree)), safetensors.torch.load(safetensors.torch.save(tensors)))


def facts(value):
    """What has to be the same: types all the way down, order, bits."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        assert kind is torch.Tensor
        if value.layout is torch.sparse_coo:
            parts = (value._indices(), value._values(), value.is_coalesced())
        elif value.layout is torch.strided:
            flat = value.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).flatten()
            return kind, value.dtype, value.shape, flat.view(torch.uint8).numpy().tobytes()
        else:
            rows = value.layout in (torch.sparse_csr, torch.sparse_bsr)
            names = ("crow_indices", "col_indices") if rows else ("ccol_indices", "row_indices")
            parts = (*(getattr(value, name)() for name in names), value.values())
        return kind, value.layout, value.shape, [facts(part) for part in parts]
    if isinstance(value, np.ndarray):
        return kind, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, np.generic):
        return kind, value.dtype.str, value.tobytes()
    if kind is float:
        return kind, struct.pack(">d", value)
    if kind is complex:
        return kind, struct.pack(">dd", value.real, value.imag)
    if kind is dict:
        return kind, [(facts(key), facts(part)) for key, part in value.items()]
    if kind in (list, tuple):
        return kind, [facts(part) for part in value]
    return kind, value


def bits(number):
    return struct.unpack(">d", struct.pack(">Q", number))[0]


TYPES = (
    "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64 complex128 "
    "complex32 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2"
)
DTYPES = {name: getattr(torch, name) for name in TYPES.split(" ")}
ARRAYS = ["|b1", "|i1", "<i2", ">i4", "<i8", "|u1", ">u2", "<u8", "<f2", ">f4", "<f8", "<c8", ">c16", "<U3", ">U2"]
ARRAYS += ["|S4", "<M8[ns]", ">M8[D]", "<M8[25s]", "<M8", "<m8[us]", np.dtype(np.longdouble).str]


def noise(dtype, shape, seed=0):
    """A tensor of random bits: NaNs with payloads and denormal numbers too."""
    count = int(np.prod(shape, dtype=int))
    if dtype is torch.bool:
        return torch.from_numpy(np.random.default_rng(seed).integers(0, 2, count) > 0).reshape(shape)
    data = bytearray(np.random.default_rng(seed).bytes(count * dtype.itemsize))
    flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    tensor = noise(draw(st.sampled_from([*DTYPES.values()])), shape, draw(st.integers(0, 99)))
    how = draw(st.sampled_from(["plain", "reversed", "sliced", "expanded", "conjugate"]))
    if how == "reversed":
        return tensor.permute(tuple(reversed(range(tensor.dim()))))
    if how == "sliced" and tensor.dim():
        return tensor[..., ::2]
    if how == "expanded":
        return tensor.expand(2, *tensor.shape)
    return tensor.conj() if how == "conjugate" and tensor.dtype in (torch.complex64, torch.complex128) else tensor


@st.composite
def arrays(draw):
    dtype, shape = np.dtype(draw(st.sampled_from(ARRAYS))), draw(st.lists(st.integers(0, 3), max_size=3))
    count = int(np.prod(shape, dtype=int))
    if dtype.kind == "U":
        return np.full(shape, draw(st.text(max_size=3)), dtype)
    high = 2 if dtype.kind == "b" else 256
    data = np.random.default_rng(draw(st.integers(0, 99))).integers(0, high, count * dtype.itemsize, np.uint8)
    array = data.view(dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


NUMBERS = st.integers() | st.floats() | st.integers(0, 2**64 - 1).map(bits)
TEXT = st.text(st.characters(), max_size=5) | st.text(max_size=3).map("${}".format) | st.sampled_from(["$tensor", "#"])
ATOMS = st.none() | st.booleans() | NUMBERS | TEXT
KEYS = st.none() | st.booleans() | st.floats() | st.integers(-(2**63), 2**64 - 1) | TEXT
RARE = st.binary(max_size=5) | st.builds(complex, st.floats(), st.floats()) | arrays() | tensors()
RARE |= arrays().filter(lambda array: array.size and array.dtype.kind not in "US").map(lambda array: array.flat[0])
RARE |= st.sampled_from([torch.float32, torch.complex128, torch.device("cpu"), torch.device("cuda", 1)])
STATES = st.recursive(
    ATOMS | RARE,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(TEXT, inner, max_size=4)
        | st.dictionaries(KEYS | st.lists(KEYS, max_size=2).map(tuple), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(STATES)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_any_state_comes_back(state):
    assert facts(through(state)) == facts(state)


@settings(max_examples=300, deadline=None)
@given(NUMBERS)
def test_numbers_come_back_to_the_bit(number):
    assert facts(through([number])) == facts([number])


ODD = {
    "numbers": [0, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**5000, True, False, 1.0, -0.0],
    "floats": [float("inf"), -float("inf"), bits(0x7FF8000000000123), bits(0xFFF0000000000001), 5e-324, 1e16, 1e22],
    "complex": [complex(-0.0, float("nan")), complex(float("inf"), -0.0), 1j],
    "text": ["", "\ud800", "a\udfffb", "\U0001f600", '"\\\n\x00', "$tuple", "{[{["],
    "bytes": [b"", b"\x00\xff"],
    "empty": [[], (), {}, [[]], ((),), {"a": {}}],
    "keys": [{1: "a", "1": "b", 2.5: "c", None: "d", (1, ("x", None)): "e"}, {True: 1}, {1.0: 1}, {-0.0: 0}],
    "dollar": [{"$tuple": [1]}, {"a": 1, "$b": 2}, {"\ud800": 1}, {"": 1}, {"$dict": []}],
    "integers only": [list(range(700)), tuple(range(700)), [1, True], [1, 2**64], [2**64 - 1, -(2**63)], (1, 2.0)],
    "numpy numbers": [np.float64(0.1), np.float32("nan"), np.int64(-1), np.bool_(True), np.complex64(1j)],
    "large numpy numbers": [np.uint64(2**64 - 1), np.longdouble("1e-4000")],
    "times": [
        np.datetime64("2024-02-29T12:00:00.000001"),
        np.timedelta64("NaT"),
        np.array(["NaT", "2001-01-01"], "M8"),
    ],
    "arrays": [np.array(1.5), np.zeros((0, 3), ">f4"), np.array(["ab", ""]), np.ones((2, 3)).T, np.arange(9)[::-2]],
    "torch": [torch.bfloat16, torch.device("cuda:3"), torch.device("cpu")],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_values_come_back(name):
    assert facts(through(ODD[name])) == facts(ODD[name])
    assert facts(through({"a": ODD[name]})) == facts({"a": ODD[name]})


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", DTYPES)
def test_tensors_of_every_type_come_back(name):
    whole = noise(DTYPES[name], (4, 6))
    state = [
        whole,
        whole.t(),
        noise(DTYPES[name], ()),
        noise(DTYPES[name], (0, 2)),
        noise(DTYPES[name], (3, 8))[:, 1:3],
    ]
    back = through(state)
    assert facts(back) == facts(state)
    assert back[1].stride() == (1, 6) and back[0].data_ptr() == back[1].data_ptr()


def test_layout_in_memory_comes_back():
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    back = through({"image": image, "t": torch.randn(3, 4).t(), "cut": torch.randn(9, 9)[:, 2:4]})
    assert back["image"].stride() == image.stride() and back["t"].stride() == (1, 4)
    assert back["cut"].is_contiguous()


def test_pending_conjugation_and_negation_are_carried_out():
    numbers = torch.randn(3, dtype=torch.complex64)
    back = through([numbers, numbers.conj(), numbers.conj().imag])
    assert facts(back) == facts([numbers, numbers.conj().resolve_conj(), -numbers.imag])
    assert not back[1].is_conj() and not back[2].is_neg()


def test_tied_tensors_are_one_tensor_again():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    tree, stored = encode(model.state_dict())
    back = decode(tree, stored)
    assert len(stored) == 1 and back["embed.weight"] is back["head.weight"]
    turned = torch.randn(2, 3).t()
    back = through({"a": turned, "b": turned.view(3, 2), "c": [turned.detach()], "d": turned.clone()})
    assert back["a"] is back["b"] is back["c"][0] is not back["d"]
    empty = torch.zeros(0)
    back = through([empty, empty, torch.zeros(0)])
    assert back[0] is back[1] is not back[2]


def test_views_of_one_memory_share_it_again():
    flat = torch.arange(10.0)
    state = {"first": flat[:4].view(2, 2), "second": flat[4:], "flat": flat}
    _, stored = encode(state)
    back = through(state)
    assert facts(back) == facts(state) and [tensor.nbytes for tensor in stored.values()] == [40]
    back["flat"].zero_()
    assert back["first"].sum() == back["second"].sum() == 0


@pytest.mark.parametrize("parts", [(slice(0, 3), slice(3, 9)), (slice(5, 9), slice(1, 5)), (slice(1, 7), slice(2, 9))])
def test_views_that_tile_or_overlap_share_memory_without_the_whole(parts):
    flat = torch.arange(100.0)
    tree, stored = encode([flat[part] for part in parts])
    back = decode(tree, stored)
    assert sum(tensor.nbytes for tensor in stored.values()) <= 4 * 9
    assert facts(back) == facts([flat[part] for part in parts])
    assert back[0].untyped_storage().data_ptr() == back[1].untyped_storage().data_ptr()


def test_views_of_different_types_share_memory_again():
    data = torch.arange(67, dtype=torch.uint8)
    state = [data[3:], data[8:24].view(torch.float64), data[16:64].view(torch.complex64)]
    back = through({"odd": data.new_ones(1), "views": state})["views"]
    assert facts(back) == facts(state)
    back[0].fill_(1)
    ones = torch.ones(48, dtype=torch.uint8)
    assert facts(back[1:]) == facts([ones[:16].view(torch.float64), ones.view(torch.complex64)])


def test_little_parts_of_a_giant_are_stored_apart():
    giant = torch.arange(100_000.0)
    state = [giant[:3], giant[2:5], giant[90_000:90_002], giant[7:8].expand(4), giant[::30_000]]
    _, stored = encode(state)
    assert sum(tensor.nbytes for tensor in stored.values()) < 100
    assert facts(through(state)) == facts(state)


def test_an_expanded_tensor_and_its_origin():
    origin = torch.arange(3.0)
    state = [origin, origin.expand(50, 3), origin[1:], torch.ones(1).expand(1000, 5)]
    back = through(state)
    assert facts(back) == facts(state)
    back[0].zero_()
    assert back[2].sum() == 0


def test_arrays_and_tensors_over_one_memory_are_kept_apart():
    array = np.arange(6.0)
    state = [array, torch.from_numpy(array), torch.from_numpy(array), torch.from_numpy(array[:3]), array[1:]]
    assert facts(through(state)) == facts(state)
    back = through(state)
    back[0][0] = 9  # and what comes back can be written to
    assert back[1][0] == 0


def test_parameters_come_back_as_plain_tensors():
    weight = nn.Parameter(torch.randn(2))
    back = through({"w": weight, "b": nn.Buffer(torch.ones(1))})
    assert facts(back["w"]) == facts(weight.detach()) and not back["w"].requires_grad
    with torch.inference_mode():
        made = torch.ones(2, 3).t()
    assert facts(through(made)) == facts(made)


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:.*[Ii]nvariant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128, torch.int64])
def test_sparse_tensors_come_back(dtype):
    dense = torch.tensor([[0, 1, 0, 2], [3, 0, 0, 0]], dtype=dtype)
    loose = torch.sparse_coo_tensor([[0, 0, 1], [1, 1, 0]], torch.tensor([1, 2, 3], dtype=dtype), (2, 4))
    hybrid = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 5, dtype=dtype), (3, 5))
    state = [
        dense.to_sparse(),
        loose,
        hybrid,
        dense.to_sparse_csr(),
        dense.to_sparse_csc(),
        torch.zeros(0, 3).to_sparse(),
    ]
    state += [dense.to_sparse_bsr((2, 2)), dense.to_sparse_bsc((1, 2))]
    assert [tensor.is_coalesced() for tensor in through(state)[:2]] == [True, False]
    assert facts(through(state)) == facts(state)


def test_names_of_tensors_are_paths_and_unique():
    state = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, 1: torch.tensor(2), "1": torch.tensor(3)}
    state |= {"\ud800": torch.ones(2), "1#3": torch.tensor(4)}
    _, stored = encode(state)
    assert list(stored) == ["state.a.b", "state.a.b#1", "state.1", "state.1#3", "state.\\ud800", "state.1#3#5"]
    assert facts(through(state)) == facts(state)


def test_kinds_of_dicts_come_back_as_what_they_were():
    state = {"o": OrderedDict(b=1, a=2), "c": Counter("aab"), "n": Counter({30: 2, 80: 1}), "e": Counter()}
    back = through(state)
    assert back == state and [type(part) for part in back.values()] == [OrderedDict, Counter, Counter, Counter]
    assert list(back["o"]) == ["b", "a"] and back["n"][5] == 0
    deeper = through(OrderedDict({"x": torch.ones(2)}))
    assert type(deeper) is OrderedDict and torch.equal(deeper["x"], torch.ones(2))


def test_a_schedule_with_a_counter_is_put_back_whole():
    def schedule():
        return torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([torch.ones(1)], lr=1.0), [2, 2, 5])

    one, two = schedule(), schedule()
    two.load_state_dict(through(one.state_dict()))
    assert type(two.milestones) is Counter and list(two.milestones.elements()) == [2, 2, 5]


@pytest.mark.parametrize("value", [defaultdict(list, {1: [2]}), UserDict(y=2), type("Config", (dict,), {})(a=1)])
def test_dicts_with_a_mind_of_their_own_are_refused(value):
    with pytest.raises(CheckpointError) as caught:
        encode({"observer": {"seen": value}})
    assert caught.value.where == "state.observer.seen" and caught.value.fix == "save dict(value)"


@pytest.mark.parametrize("mark", ["$ordered", "$counter"])
@pytest.mark.parametrize("content", [[], {"$tuple": []}, {"$bytes": "00"}, {"$dict": [[{"$tuple": []}, 1], [1]]}])
def test_a_kind_of_dict_that_holds_none_is_refused(mark, content):
    with pytest.raises(CheckpointError):
        decode({mark: content}, {})


def test_enums_come_back_as_values():
    class Level(enum.IntEnum):
        HIGH = 3

    class Mode(enum.StrEnum):
        MIN = "min"

    back = through({"d": [Level.HIGH, Mode.MIN], Mode.MIN: 1})
    assert facts(back) == facts({"d": [3, "min"], "min": 1})


class Versioned(nn.Linear):
    """A layer whose state dicts of old had another sign, as layers of torchvision and detectron2 do."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if local_metadata.get("version") != 2:
            raise ValueError("too old")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


def test_the_versions_of_layers_stay_with_a_state_dict():
    model = nn.Sequential(Versioned(2, 2), nn.BatchNorm1d(2))
    back = through({"model": model.state_dict()})["model"]
    assert type(back) is OrderedDict and back._metadata == dict(model.state_dict()._metadata)
    other = nn.Sequential(Versioned(2, 2), nn.BatchNorm1d(2))
    other.load_state_dict(back)
    assert torch.equal(other[0].weight, model[0].weight)
    with pytest.raises(ValueError, match="too old"):
        other.load_state_dict(dict(back))


# Real states.


def trained(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make([p for p in model.parameters() if make is not torch.optim.Muon or p.dim() == 2])
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
    return optimizer


OPTIMIZERS = {
    "adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad, "muon": torch.optim.Muon, "rprop": torch.optim.Rprop,
    "adafactor": torch.optim.Adafactor, "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "tensor lr": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.1), amsgrad=True),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_optimizers(name):
    state = trained(OPTIMIZERS[name]).state_dict()
    assert facts(through(state)) == facts(state)
    other = trained(OPTIMIZERS[name])
    other.load_state_dict(through(state))
    assert facts(other.state_dict()) == facts(state)


def test_states_of_schedules_and_scalers():
    optimizer = trained(OPTIMIZERS["sgd"])
    scheduler = torch.optim.lr_scheduler
    plateau = scheduler.ReduceLROnPlateau(optimizer, patience=1)
    plateau.step(float("nan"))
    cycle = scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    both = [scheduler.LinearLR(optimizer), scheduler.CosineAnnealingLR(optimizer, 5)]
    chain = scheduler.SequentialLR(optimizer, both, milestones=[2])
    steps = scheduler.MultiStepLR(optimizer, [3, 5, 5])
    for part in (plateau, cycle, chain, torch.amp.GradScaler("cpu")):
        state = part.state_dict()
        assert facts(through(state)) == facts(state)
    assert through(steps.state_dict())["milestones"] == {3: 1, 5: 2}


def test_states_of_metrics_and_recurrent_layers():
    from torchmetrics import CatMetric
    from torchmetrics.classification import MulticlassAccuracy

    numbers = torch.tensor([0, 2])
    for metric, batch in ((MulticlassAccuracy(3), (numbers, numbers)), (CatMetric(), (numbers,))):
        metric.persistent(True)
        metric.update(*batch)
        state = dict(metric.state_dict())
        assert state
        assert facts(through(state)) == facts(state)
    layer = nn.LSTM(3, 4, num_layers=2)
    flat = nn.utils.parameters_to_vector(layer.parameters()).detach()  # as cuDNN keeps them: parts of one buffer
    nn.utils.vector_to_parameters(flat, layer.parameters())
    tree, stored = encode(layer.state_dict())
    assert len(stored) == 1
    other = nn.LSTM(3, 4, num_layers=2)
    other.load_state_dict(decode(tree, stored))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), layer.parameters()))


def test_states_of_generators():
    kinds = (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
    random.gauss(0, 1)
    np.random.standard_normal()
    state = {"global": seeding.generator_states(), **{kind.__name__: kind(3).state for kind in kinds}}
    back = through(state)
    assert facts(back) == facts(state)
    seeding.set_generator_states(back["global"])
    drawn = random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist()
    seeding.set_generator_states(state["global"])
    assert drawn == (random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist())
    for kind in kinds:
        generator = kind(0)
        generator.state = back[kind.__name__]
        assert generator.random_raw() == kind(3).random_raw()


# What cannot be saved.


class Colour(enum.Enum):
    RED = 1


class Pair(enum.IntEnum):
    """An enumeration whose members are not what their value says."""

    def __new__(cls, value):
        member = int.__new__(cls, value)
        member._value_ = (value, value)
        return member

    ONE = 1


class Names(str):
    pass


class Wrapped(torch.Tensor):
    pass


Point = namedtuple("Point", "x y")
DEFAULT = "keep numbers, strings, tensors, lists and dicts of them in state_dict()"
TENSOR = "save a plain tensor, for example value.to_dense() or value.full_tensor()"
REFUSED = {
    "object": (object(), "object", DEFAULT),
    "function": (print, "builtin_function_or_method", DEFAULT),
    "set": ({1}, "set", "save sorted(value)"),
    "frozenset": (frozenset(), "frozenset", "save sorted(value)"),
    "bytearray": (bytearray(), "bytearray", DEFAULT),
    "enum": (Colour.RED, "Colour", "save its .name or .value"),
    "odd enum": (Pair.ONE, "Pair", "save its .name or .value"),
    "namedtuple": (Point(1, 2), "Point", "save tuple(value)"),
    "size": (torch.Size([1]), "Size", "save tuple(value)"),
    "text of one's own": (Names("a"), "Names", DEFAULT),
    "numpy text": (np.str_("a"), "str_", DEFAULT),
    "generator": (torch.Generator(), "Generator", "save generator.get_state()"),
    "numpy generator": (np.random.default_rng(0), "Generator", DEFAULT),
    "objects": (np.array([1, None]), "ndarray of object", DEFAULT),
    "structure": (np.zeros(1, "i4,f4"), "ndarray of [('f0', '<i4'), ('f1', '<f4')]", DEFAULT),
    "matrix": (np.ma.array([1]), "MaskedArray of int64", DEFAULT),
    "meta": (torch.ones(1, device="meta"), "Tensor (torch.float32, torch.strided, on meta)", TENSOR),
    "subclass": (torch.ones(1).as_subclass(Wrapped), "Wrapped (torch.float32, torch.strided, on cpu)", TENSOR),
    "lazy": (nn.LazyLinear(1).weight, "UninitializedParameter (torch.float32, torch.strided, on cpu)", TENSOR),
    "module": (nn.Linear(1, 1), "Linear", DEFAULT),
    "device": (torch.device("vulkan"), "device", DEFAULT),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_is_refused_with_its_place(name):
    value, kind, fix = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        encode({"optimizer": {"state": {0: {"hook": [1, value]}}}})
    assert str(caught.value) == (
        f"a value of the type {kind} cannot be saved.\n  where: state.optimizer.state.0.hook.1\n  fix:   {fix}"
    )


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain_are_refused():
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    for tensor in (quantized, nested, freed, torch.ones(2).to_mkldnn()):
        with pytest.raises(CheckpointError, match=r"a value of the type Tensor \(.*\) cannot be saved"):
            encode([tensor])


@pytest.mark.parametrize("key", [object(), b"a", Colour.RED, np.int64(1), 2**64, (1, b"a"), frozenset()])
def test_keys_that_cannot_be_saved(key):
    with pytest.raises(CheckpointError) as caught:
        encode([{"a": {key: 1}}])
    assert str(caught.value) == (
        f"a dict with a key of the type {type(key).__name__} cannot be saved.\n  where: state.0.a\n"
        "  fix:   use keys that are strings, numbers of up to 64 bits, None or tuples of them"
    )


def test_a_state_that_contains_itself():
    state = {"a": []}
    state["a"].append(state)
    with pytest.raises(CheckpointError) as caught:
        encode(state)
    assert str(caught.value) == (
        "the state is nested deeper than 64 levels.\n  where: state.a.0.a.0.a.0.a...\n"
        "  fix:   look for a list or dict that contains itself"
    )
    deep = torch.ones(1)
    for _ in range(15):
        deep = {(1, (2,)): {"a": ([deep],)}}
    deep = {"model": OrderedDict(a=deep)}
    deep["model"]._metadata = OrderedDict()
    assert facts(through([deep])[0]["model"]["a"]) == facts(deep["model"]["a"])


# What comes from a stranger.

BAD_JSON = {
    "no JSON": b"\x80\x04K\x01.",
    "nothing": b"",
    "deep lists": b"[" * 10_000 + b"]" * 10_000,
    "deep lists with room": b"[" * 10_000 + b"]" * 10_000 + b" " * 60_000,
    "deep dicts": b'{"aaaa":' * 10_000 + b"1" + b"}" * 10_000,
    "a key twice": b'{"a":1,"a":2}',
    "spaces": b'{"a": 12345}',
    "NaN": b"[1,NaN]     ",
    "infinity": b"[1e999]       ",
    "a number in other words": b"[1.50,2E3,34]",
    "minus nothing": b"[1,-0,33333]",
    "escapes": rb'{"\u0061bcde":1}',
    "a lone surrogate": rb'["\ud800aaaaa"]',
    "no UTF-8": b'["\xff\xff\xffaaaaa"]',
    "empty lists": b"[" + b"{}," * 30_000 + b"1]",
    "a tail": b'{"abcdefgh":1}1',
    "a comment": b'{"abcdefgh":1}//',
    "a large integer": b"[" + b"9" * 100_000 + b"]",
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_was_not_written_here_is_refused(name):
    with pytest.raises(CheckpointError, match=r"the state cannot be read: .*\n  where: the JSON of a checkpoint"):
        loads(BAD_JSON[name])


def test_the_same_tree_gives_the_same_bytes_with_room_for_its_lists():
    tree = [[], [{}], {"a": 1.5}]
    assert dumps(tree) == dumps(loads(dumps(tree))) and json.loads(dumps(tree)) == tree
    assert len(dumps(tree)) == 40
    with pytest.raises(CheckpointError, match="more lists than it has room for"):
        loads(dumps(tree).strip())
    many = [[0, 1]] * 50_000
    assert loads(dumps(many)) == many


FLAT = {"flat": torch.arange(20.0)[4:12], "bytes": torch.arange(16, dtype=torch.uint8), "square": torch.ones(2, 2)}
FLAT |= {"at": torch.tensor([[0, 5]]), "values": torch.ones(2), "rows": torch.tensor([0, 1, 2])}
AT, VALUES, ROWS, BYTES = ({"$tensor": name} for name in ("at", "values", "rows", "bytes"))
HOSTILE = [
    *({"$tensor": content} for content in ("missing", 1, None, ["flat"])),
    {"$tensor": "flat", "a": 1}, {"a": 1, "$tensor": "flat"}, {"$object": "os.system"}, {"$": 1},
    {"$csv": [[1], 1, 1, 1]},
    *({"$tuple": content} for content in ("abc", {"a": 1}, 1)),
    *({"$dict": content} for content in ({"a": 1}, [[1]], [[1, 2], [1, 3]], [[[1], 2]], [[{"a": 1}, 2]], "ab", [1])),
    *({"$dict": [[key, 1]]} for key in (AT, {"$int": "0x" + "f" * 20}, {"$bytes": "00"}, {"$dict": []})),
    {"$dict": ["ab", "ac"]}, {"$dict": [[1, 2], [True, 2]]},
    *({"$int": content} for content in ("xyz", 5, "", None)),
    *({"$float": content} for content in ("zz", "00", 1.0)),
    *({"$str": content} for content in ("0", "ff", 1)), *({"$bytes": content} for content in ("0", None, [])),
    *({"$complex": content} for content in ([1], ["a", 1.0], [1.0, [2.0]], 1)),
    *({"$dtype": content} for content in ("load", "float33", 1)),
    *({"$device": content} for content in ("cuda:99999", "vulkan", "cpu\n", 0)),
    *({"$view": ["flat", "float32", *where]} for where in (
        ([9], [1], 0), ([8], [1], 1), ([2], [8], 0), ([1], [1], 8), ([1], [1], -1), ([-1], [1], 0), ([2], [-1], 1),
        ([2**40], [0], 0), ([2**62, 2**62], [0, 0], 0), ([2], [2**62], 0), ([2], [1, 1], 0), ([1] * 65, [1] * 65, 0),
        ([True], [1], 0), ([1.0], [1], 0), ([1], [1]), ([1], [1], 0, 0), ("1", "1", 0), ([1], [1], "0"),
    )),
    *({"$view": [name, dtype, [1], [1], 1]} for name, dtype in (
        ("missing", "float32"), ("flat", "float64"), ("flat", "int32"), ("square", "float32"), ("bytes", "qint8"),
        ("bytes", "complex128"),
    )),
    {"$view": ["bytes", "float64", [3], [1], 0]}, {"$view": 1},
    *({"$array": [BYTES, *what]} for what in (
        ("|O", [2]), ("f8,f8", [1]), ("<f8", [3]), ("<f8", [-1]), ("<U999999999", [0]), ("<U3", [1]), ("<M8[zz]", [2]),
        ("|V8", [2]), ("<f8", 2), ("|u1", [2**62, 2**62]), ("|u1", [1] * 65), ("<f8", [True, 2]), ("<U0", [2**60]),
    )),
    {"$array": [[1, 2], "<f8", [2]]}, {"$array": ["bytes", "<f8", [2]]},
    *({"$scalar": content} for content in (["<f8", "00"], ["|O", "00" * 8], ["<f8", "00" * 16], ["<f8", ""], "<f8")),
    *({"$state_dict": content} for content in ([{}, {"": 1}], [{}, [1]], [[1], {}], [{"$tuple": []}, {}])),
    {"$state_dict": [{}, {"$tuple": []}]},
    *({"$coo": content} for content in (
        [[3, 3], True, AT, VALUES], [[4], False, AT, VALUES], [[6], 1, AT, VALUES], [[6], True, AT, AT],
        [[6], True, 1, 2], [[2**62, 2**62], False, AT, VALUES],
    )),
    *({"$csr": [shape, ROWS, ROWS, VALUES]} for shape in ([2, 2], [2**40, 2], [2**62, 2**62])),
    {"$csr": [[2, 2], 1, 2, 3]},
    {"$bsr": [[2, 2], {}]},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda tree: str(tree)[:60])
def test_a_hostile_tree_is_refused(hostile):
    for tree in (hostile, [1, {"a": hostile}], {"$tuple": [hostile]}):
        with pytest.raises(CheckpointError, match=r"the state is malformed: .*\n  where: state.*\n  fix: "):
            decode(loads(dumps(tree)), FLAT)


def test_the_place_of_a_malformed_entry_is_told():
    with pytest.raises(CheckpointError) as caught:
        decode({"optimizer": [1, {"$tuple": [{"$view": ["flat", "float32", [9], [1], 0]}]}]}, FLAT)
    assert str(caught.value) == (
        "the state is malformed: a view reaches beyond its tensor.\n  where: state.optimizer.1.0\n"
        "  fix:   use an older checkpoint"
    )


def test_trees_that_no_file_can_hold():
    deep = 1
    for _ in range(5000):
        deep = {"$tuple": [deep]}
    for tree in (deep, {1: 2}, {"a": {None: 1}}):
        with pytest.raises(CheckpointError):
            decode(tree, {})


def places(tree, path=()):
    yield path
    if isinstance(tree, dict | list):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(part, (*path, key))


def mutated(tree, chance):
    """The tree with one entry replaced, removed, doubled or renamed."""
    tree = json.loads(json.dumps(tree))
    inside = [path for path in places(tree) if path]
    if not inside:
        return tree
    *path, last = chance.choice(inside)
    parent = tree
    for key in path:
        parent = parent[key]
    strange = [None, True, -1, 0, 1, 7, 2**40, 2**63, 1.5, "", "$tensor", "state.0", "float64", "<f4", [], {}, [1]]
    how = chance.randrange(4)
    if how == 0:
        parent[last] = chance.choice([*strange, chance.choice(HOSTILE)])
    elif how == 1:
        del parent[last]
    elif isinstance(parent, list):
        parent.insert(last, parent[last] if how == 2 else chance.choice(strange))
    else:
        parent[chance.choice(["$tuple", "$dict", "$view", "$array", "$coo", "$csr", "$state_dict", "a"])] = parent.pop(
            last
        )
    return tree


@pytest.mark.filterwarnings("ignore:Sparse")
def test_mutations_are_refused_or_decoded():
    flat = torch.arange(64.0)
    state = {
        "views": [flat[:32].view(4, 8), flat[16:].view(2, 24).t(), flat], "z": torch.ones(2, 2, dtype=torch.complex128),
        "sparse": [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.eye(4).to_sparse_bsc((2, 2))],
        "numpy": [np.arange(3.0), np.float32(1), np.array(["a", "bc"]), np.array("2001-01-01", "M8[D]")],
        "odd": [1j, b"abc", 2**70, float("nan"), "\ud800", torch.float32, torch.device("cpu"), (1, (2,))],
        "model": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict(), 1: {None: 2, (1, 2): 3},
    }  # fmt: skip
    tree, stored = encode(state)
    chance = random.Random(0)
    refused = 0
    for _ in range(3000):
        wrong = mutated(tree, chance)
        for _ in range(chance.randrange(3)):
            wrong = mutated(wrong, chance)
        try:
            back = decode(loads(dumps(wrong)), stored)
            facts(back)  # every tensor can be read
        except CheckpointError:
            refused += 1
    assert 1000 < refused < 2900


def test_a_file_at_odd_addresses(tmp_path):
    state = [
        torch.ones(3, dtype=torch.int8),
        torch.randn(5, dtype=torch.complex128),
        np.arange(4.0),
        torch.randn(3, 2).t(),
    ]
    tree, stored = encode(state)
    data = safetensors.torch.save(stored)
    for shift in range(1, 9):
        views = {
            name: torch.frombuffer(bytearray(b"\0" * shift + tensor.numpy().tobytes()), dtype=torch.uint8)[shift:]
            if tensor.dtype is torch.uint8 else tensor
            for name, tensor in safetensors.torch.load(data).items()
        }  # fmt: skip
        assert facts(decode(tree, views)) == facts(state)
    (tmp_path / "f.safetensors").write_bytes(data)
    assert facts(decode(tree, safetensors.torch.load_file(tmp_path / "f.safetensors"))) == facts(state)
