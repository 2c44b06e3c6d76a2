"""Encoders in stages, and cascades whose rows leave one by one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertModel

from fathom.models.encoders.base import State
from fathom.models.encoders.bert import Bert, load_bert
from fathom.models.encoders.resnet import ResNet, load_resnet
from fathom.models.errors import ModelError
from fathom.models.inputs import TextReader, TextRows
from fathom.models.multi_exit import MultiExit, build
from tests.tiny_classifiers import save_random_bert

TEXTS = ["good film", "a very very bad plot the actor", "not", "quite good the a a bad film plot"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def text_model(bert_dir: Path) -> MultiExit:
    torch.manual_seed(1)
    return MultiExit(load_bert(bert_dir), classes=3, hidden=8).eval()


@pytest.fixture(scope="module")
def image_model() -> MultiExit:
    torch.manual_seed(2)
    model = MultiExit(ResNet(2, (1, 3, 6)), classes=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # fresh statistics would hide wrong ones
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def rows(bert_dir: Path) -> TextRows:
    return TextReader(bert_dir / "tokenizer.json", 32).read(TEXTS)


def test_stages_are_transformers_layers(bert_dir: Path, rows: TextRows) -> None:
    theirs = BertModel.from_pretrained(bert_dir, add_pooling_layer=False).eval()
    ids = rows.batch(range(len(rows)))
    mask = torch.arange(ids.shape[1]) < rows.sizes[:, None]
    ours = load_bert(bert_dir).eval()
    with torch.inference_mode():
        hidden = theirs(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        state = ours.begin(ids, rows.sizes)
        torch.testing.assert_close(state.hidden, hidden[0])
        for index in range(ours.num_stages):
            state = ours.stage(index, state)
            torch.testing.assert_close(state.hidden[mask], hidden[index + 1][mask])
            for row, size in enumerate(rows.sizes.tolist()):
                mean = hidden[index + 1][row, :size].mean(0)
                torch.testing.assert_close(ours.feature(index, state)[row], mean)


def test_what_pads_a_row_does_not_matter(text_model: MultiExit, rows: TextRows) -> None:
    ids = rows.batch(range(len(rows)))
    other = ids.clone()
    for row, size in enumerate(rows.sizes.tolist()):
        other[row, size:] = 5
    with torch.inference_mode():
        together = text_model(ids, rows.sizes)
        torch.testing.assert_close(text_model(other, rows.sizes), together)
        for row in range(len(rows)):
            alone = text_model(rows.batch([row]), rows.sizes[[row]])
            torch.testing.assert_close(alone[0], together[row])


def plain_resnet(net: ResNet, x: Tensor) -> Tensor:
    """The network written as one function, with option A's shortcut by another road."""
    norm = nn.functional.batch_norm

    def bn(x: Tensor, of: nn.BatchNorm2d) -> Tensor:
        return norm(x, of.running_mean, of.running_var, of.weight, of.bias, eps=of.eps)

    x = bn(nn.functional.conv2d(x, net.conv.weight, padding=1), net.bn).relu()
    for block in net.blocks:
        stride = 2 if block.conv1.weight.shape[0] != x.shape[1] else 1
        y = bn(nn.functional.conv2d(x, block.conv1.weight, stride=stride, padding=1), block.bn1)
        y = bn(nn.functional.conv2d(y.relu(), block.conv2.weight, padding=1), block.bn2)
        if stride == 2:
            quarter = x.shape[1] // 2
            wide = torch.zeros_like(y)
            wide[:, quarter : quarter + x.shape[1]] = x[:, :, ::2, ::2]
            x = wide
        x = (x + y).relu()
    return x


def test_a_resnet_in_stages_is_the_network(image_model: MultiExit) -> None:
    net = image_model.encoder
    assert isinstance(net, ResNet)
    x = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        features = image_model.features(x, torch.ones(3, dtype=torch.int64))
        torch.testing.assert_close(features[-1], plain_resnet(net, x))
    assert [f.shape[1:] for f in features] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_published_resnets_classify(tmp_path: Path) -> None:
    folder = os.environ.get("FATHOM_RESNETS", "")
    files = sorted(Path(folder).glob("resnet*.th")) if folder else []
    data = Path(os.environ.get("FATHOM_DATA", "")) / "cifar10" / "cifar10_jpeg_test.parquet"
    if not files or not data.is_file():
        pytest.skip(
            "set FATHOM_RESNETS to a folder with github.com/akamaster/pytorch_resnet_cifar10's .th "
            "files, and FATHOM_DATA to one with cifar10/cifar10_jpeg_test.parquet"
        )
    from fathom.models.inputs import ImageReader
    from fathom.training.labelled import read_labelled

    test = read_labelled(data).take(range(200))
    rows = ImageReader().read(test.inputs)
    labels = torch.tensor([int(label) for label in test.labels])
    net, weight, bias = load_resnet(files[0], ())
    model = MultiExit(net, 10).eval()
    with torch.inference_mode():
        deep = model.features(rows.batch(range(200)), rows.sizes)[-1].mean((2, 3))
        right = ((deep @ weight.T + bias).argmax(-1) == labels).float().mean()
    assert right > 0.7  # 0.92 on the original images; these are JPEG copies


@given(st.data())
@settings(max_examples=40)
def test_rows_leave_with_the_answer_that_all_heads_give(
    text_model: MultiExit, image_model: MultiExit, rows: TextRows, data: st.DataObject
) -> None:
    """Whoever leaves where, each gets what a full run of every head says at that head."""
    if data.draw(st.booleans()):
        model, inputs, sizes = text_model, rows.batch(range(len(rows))), rows.sizes
    else:
        model, sizes = image_model, torch.ones(5, dtype=torch.int64)
        inputs = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    last = model.num_heads - 1
    exits = data.draw(st.lists(st.integers(0, last), min_size=len(sizes), max_size=len(sizes)))
    wanted = torch.tensor(exits)
    asked: list[tuple[int, list[int]]] = []

    def decide(head: int, active: Tensor, logits: Tensor) -> Tensor:
        asked.append((head, active.tolist()))
        assert logits.shape == (len(active), model.classes)
        return wanted[active] == head

    heads, logits = model.cascade(inputs, sizes, decide)
    assert heads.tolist() == exits
    with torch.inference_mode():
        every = model(inputs, sizes)
    torch.testing.assert_close(
        logits, every[torch.arange(len(sizes)), wanted], atol=1e-4, rtol=1e-4
    )
    deepest = max(exits)
    assert asked == [
        (head, [row for row, exit in enumerate(exits) if exit >= head])
        for head in range(min(deepest + 1, last))
    ]


def test_stages_run_on_the_rows_that_are_left(text_model: MultiExit, rows: TextRows) -> None:
    seen: list[tuple[int, int]] = []

    class Watched(Bert):
        def stage(self, index: int, state: State) -> State:
            seen.append((state.hidden.shape[0], state.hidden.shape[1]))
            return super().stage(index, state)

    encoder = text_model.encoder
    assert isinstance(encoder, Bert)
    watched = Watched(encoder.config)
    watched.load_state_dict(encoder.state_dict())
    model = MultiExit(watched, 3, 8).eval()
    longest = int(rows.sizes.argmax())

    def all_but_the_shorter(head: int, active: Tensor, logits: Tensor) -> Tensor:
        return active == longest if head == 0 else rows.sizes[active] > rows.sizes.min()

    model.cascade(rows.batch(range(len(rows))), rows.sizes, all_but_the_shorter)
    sizes = sorted(rows.sizes.tolist())
    # Padding shrinks with the longest row that is left.
    assert seen == [(4, sizes[-1]), (3, sizes[-2]), (1, sizes[0])]


@pytest.mark.parametrize("kind", ["text", "image"])
def test_costs_are_what_torch_counts(
    text_model: MultiExit, image_model: MultiExit, kind: str
) -> None:
    model = text_model if kind == "text" else image_model
    tokens = 9
    inputs = torch.randint(4, 10, (1, tokens)) if kind == "text" else torch.randn(1, 3, 32, 32)
    sizes = torch.tensor([tokens])
    costs = model.cumulative_flops(sizes.numpy())
    static = model.static_flops(sizes.numpy())
    assert costs.shape == static.shape == (1, model.num_heads)
    assert (np.diff(costs[0]) > 0).all()
    for head in range(model.num_heads):
        counter = FlopCounterMode(display=False)
        with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model.cascade(inputs, sizes, lambda m, rows, logits, head=head: rows * 0 + m == head)
        assert counter.get_total_flops() == pytest.approx(costs[0, head], rel=1e-9)
    assert static[0, 0] == costs[0, 0]
    assert (static[0, 1:] < costs[0, 1:]).all()


def test_a_form_builds_an_equal_model(text_model: MultiExit, image_model: MultiExit) -> None:
    for model in (text_model, image_model):
        again = build(model.spec())
        again.load_state_dict(model.state_dict())
        assert again.spec() == model.spec()
    with pytest.raises(ModelError, match=r"encoder\.kind must be bert or resnet, got 'vgg'"):
        build({"encoder": {"kind": "vgg"}, "classes": 2, "hidden": 0})
    with pytest.raises(ModelError, match="form is damaged"):
        build({"encoder": {"kind": "bert"}, "classes": 2, "hidden": 0})


@pytest.mark.parametrize("exits", [(), (3, 1, 6), (1, 5), (0, 6), (2, 2, 6)])
def test_exits_must_lead_to_the_last_block(exits: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="exits must ascend from at least 1 to the last block, 6"):
        ResNet(2, exits)


def test_a_file_that_is_no_resnet_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.th"
    file.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot read it as PyTorch weights"):
        load_resnet(file, ())
    torch.save({"state_dict": {"weight": torch.ones(1)}}, file)
    with pytest.raises(ModelError, match="holds no CIFAR-10 ResNet"):
        load_resnet(file, ())


def test_a_resnet_file_is_read_whole(image_model: MultiExit, tmp_path: Path) -> None:
    net = image_model.encoder
    assert isinstance(net, ResNet)
    saved = {}
    for name, tensor in net.state_dict().items():
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            name = f"layer{int(block) // 2 + 1}.{int(block) % 2}.{rest}"
        else:
            name = name.replace("conv.", "conv1.").replace("bn.", "bn1.")
        saved[f"module.{name}"] = tensor
    saved["module.linear.weight"], saved["module.linear.bias"] = torch.rand(10, 64), torch.rand(10)
    torch.save({"state_dict": saved, "best_prec1": 92.0}, tmp_path / "net.th")
    read, weight, bias = load_resnet(tmp_path / "net.th", ())
    assert read.exits == (1, 3, 5, 6)
    assert torch.equal(weight, saved["module.linear.weight"])
    assert torch.equal(bias, saved["module.linear.bias"])
    for name, tensor in net.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    del saved["module.bn1.weight"]
    torch.save(saved, tmp_path / "part.th")
    with pytest.raises(ModelError, match=r"not a CIFAR-10 ResNet: \['bn\.weight'\]"):
        load_resnet(tmp_path / "part.th", ())
