"""``kdlab list layers``: which layers of student and teacher go together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.tiny import write_cifar
from kdlab.cli.layers import Layer, Traced, overrides, suggest, trace
from kdlab.cli.main import main
from kdlab.functional import Outputs, Taps
from kdlab.losses import Hint


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield f"data.root={write_cifar(tmp_path_factory.mktemp('cifar'), patch)}"


def listed(capsys, *words: str) -> list[str]:
    assert main(["list", "layers", *words]) == 0
    return capsys.readouterr().out.splitlines()


def pairs(lines: list[str]) -> str:
    """What is said after the trees, with single spaces."""
    start = next(n for n, line in enumerate(lines) if line.startswith("pairs"))
    return "\n".join(" ".join(line.split()) for line in lines[start:])


def typed(lines: list[str], name: str = "NAME") -> list[tuple[list[str], list[str]]]:
    """The overrides that are suggested."""
    found = []
    for line in lines:
        words = line.split()
        if words and words[0].startswith(f"loss.terms.{name}.student_layer="):
            found.append(tuple(word.split("=")[1].strip("[]").split(",") for word in words))
    return found


def test_pairs_of_one_family(capsys):
    lines = listed(capsys, "loss=fitnets")
    assert pairs(lines) == (
        "pairs of feature maps by resolution: student, teacher\n"
        "1/1 layer1 4 x 8 x 8 layer1 16 x 8 x 8\n"
        "1/2 layer2 8 x 4 x 4 layer2 32 x 4 x 4\n"
        "1/4 layer3 16 x 2 x 2 layer3 64 x 2 x 2\n"
        "loss.terms.hint.student_layer=[layer1,layer2,layer3] loss.terms.hint.teacher_layer=[layer1,layer2,layer3]\n"
        "pairs of penultimate vectors: student, teacher\n"
        "pool 16 pool 64\n"
        "loss.terms.hint.student_layer=[pool] loss.terms.hint.teacher_layer=[pool]"
    )


def test_what_is_suggested_can_be_typed(capsys):
    for line in listed(capsys, "loss=fitnets"):
        if line.strip().startswith("loss.terms"):
            assert main(["check", "experiment=kd_resnet", "loss=fitnets", *line.split()]) == 0


def test_a_projector_goes_with_the_map_that_the_teachers_classifier_reads(capsys):
    lines = listed(capsys, "experiment=simkd")
    assert pairs(lines) == (
        "pairs of feature maps by resolution: student, teacher\n"
        "1/1 net.layer1 4 x 8 x 8 layer1 16 x 8 x 8\n"
        "1/2 net.layer2 8 x 4 x 4 layer2 32 x 4 x 4\n"
        "1/4 net.layer3 16 x 2 x 2 layer3 64 x 2 x 2\n"
        "(no term of the loss takes these)\n"
        "pairs of last feature maps: student, teacher\n"
        "connector 64 x 2 x 2 layer3 64 x 2 x 2\n"
        "loss.terms.simkd.student_layer=[connector] loss.terms.simkd.teacher_layer=[layer3]\n"
        "pairs of penultimate vectors: student, teacher\n"
        "pool 64 pool 64\n"
        "(no term of the loss takes these)"
    )
    assert main(["check", "experiment=simkd", *lines[-4].split()]) == 0
    named = typed(listed(capsys, "student=simkd", "teacher=resnet20"))
    assert (["connector"], ["layer3"]) in named


@pytest.mark.parametrize(
    ("loss", "term", "expected"),
    [
        ("srrl", "srrl", [(["pool"], ["pool"])]),
        ("crd", "crd", [(["pool"], ["pool"])]),
        ("attention", "at", [(["layer1", "layer2", "layer3"],) * 2]),
        ("[hinton,ofd]", "ofd", []),
    ],
)
def test_a_term_is_offered_the_pairs_that_it_takes(capsys, loss, term, expected):
    lines = listed(capsys, f"loss={loss}")
    assert typed(lines, term) == expected and any("no term of the loss" in line for line in lines)


@pytest.mark.parametrize(
    ("student", "teacher", "maps"),
    [
        ("mobilenetv2", "resnet50", (["layer2", "layer3", "layer5"], ["layer2", "layer3", "layer4"])),
        ("vgg8", "vgg13", (["layer1", "layer2", "layer3", "layer5"], ["layer1", "layer2", "layer3", "layer5"])),
        ("shufflenetv2", "resnet32x4", (["layer1", "layer2"], ["layer2", "layer3"])),
    ],
)
def test_pairs_of_unlike_architectures(capsys, cifar, student, teacher, maps):
    lines = listed(capsys, f"student={student}", f"teacher={teacher}", "data=cifar100", "data.val=0", cifar)
    assert typed(lines) == [maps, (["pool"], ["pool"])]
    assert any(line.split()[:1] == ["1/4"] for line in lines)
    rows = [line.split() for line in lines if line.strip().startswith("1/")]
    assert rows and all(row[4:7] == row[10:13] for row in rows)  # share, path, C x H x W, path, C x H x W


def test_without_a_teacher_there_are_no_pairs(capsys):
    assert not any("pairs" in line for line in listed(capsys, "teacher=none"))


def test_pairs_of_transformers_are_spread_by_depth(capsys):
    words = ("experiment=reasoning_arithmetic", "student.settings.n_layer=2", "teacher.net.settings.n_layer=5")
    ours, theirs = typed(listed(capsys, *words))[0]
    assert ours == ["net.transformer.h.0", "net.transformer.h.1"]
    assert theirs == ["net.transformer.h.2", "net.transformer.h.4"]


def block(path: str, order: int, shape=(7, 4)) -> Layer:
    return Layer(path, "Block", shape, order, 1)


def tower(stem: str, depth: int, start: int = 0) -> list[Layer]:
    inner = [block(f"{stem}.{n}.norm.{m}", start + 3 * n + m) for n in range(depth) for m in (0, 1)]
    return [*inner, *(block(f"{stem}.{n}", start + 3 * n + 2) for n in range(depth))]


def traced(*layers: Layer) -> Traced:
    return Traced(list(layers), None, None)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (3, 12, [(0, 3), (1, 7), (2, 11)]),
        (12, 3, [(3, 0), (7, 1), (11, 2)]),
        (4, 6, [(0, 1), (1, 2), (2, 4), (3, 5)]),
        (1, 4, [(0, 3)]),
        (2, 2, [(0, 0), (1, 1)]),
    ],
)
def test_depths(ours, theirs, expected):
    [found] = suggest(traced(*tower("h", ours)), traced(*tower("blocks", theirs)))
    assert [(s.path, t.path) for _, s, t in found.each] == [(f"h.{a}", f"blocks.{b}") for a, b in expected]


def test_encoders_go_with_encoders():
    student = traced(*tower("encoder.block", 2), *tower("decoder.block", 2, start=50))
    teacher = traced(*tower("decoder.layers", 4, start=50), *tower("encoder.layers", 4))
    first, second = suggest(student, teacher)
    assert [t.path for _, _, t in first.each] == ["encoder.layers.1", "encoder.layers.3"]
    assert [t.path for _, _, t in second.each] == ["decoder.layers.1", "decoder.layers.3"]


def test_networks_that_share_nothing(capsys):
    assert suggest(traced(*tower("h", 2)), traced(Layer("layer1", "Stage", (3, 8, 8), 0, 1))) == []
    lines = listed(capsys, "student=mlp", "teacher=resnet20")
    assert typed(lines)[-1][1] == ["pool"]  # vectors go together, whatever made them


def test_a_network_of_ones_own_without_numbered_stages():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.neck = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 4, 3, 2, 1)
            self.shared, self.head = nn.ReLU(), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.shared(self.neck(self.shared(self.body(x)))).mean((2, 3)))

    net, picture = Own(), torch.zeros(1, 1, 6, 6)
    seen = trace(net, picture)
    assert seen.penultimate is None and seen.side == 6  # no module puts out what the head reads
    assert {layer.path: layer.calls for layer in seen.layers}["shared"] == 2
    [found] = suggest(seen, trace(Own(), picture))
    assert [(share, s.path) for share, s, _ in found.each] == [("1/1", "body"), ("1/2", "neck")]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    # and they are what a term takes
    with Taps(net, ["body", "neck"]) as features:
        logits = net(picture)
    outputs = Outputs(logits, dict(features))
    Hint([s.path for _, s, _ in found.each], [t.path for _, _, t in found.each]).prepare(outputs, outputs)


def test_overrides_name_the_terms_that_take_layers():
    [found] = suggest(traced(*tower("h", 1)), traced(*tower("h", 1)))
    terms = {"ce": {}, "hint": {"student_layer": "x", "teacher_layer": "y"}, "ofa": {"student_layer": ["x"]}}
    assert overrides(found, terms) == [
        "loss.terms.hint.student_layer=[h.0] loss.terms.hint.teacher_layer=[h.0]",
        "loss.terms.ofa.student_layer=[h.0]",
    ]
    assert overrides(found, {"ce": {}}) == ["loss.terms.NAME.student_layer=[h.0] loss.terms.NAME.teacher_layer=[h.0]"]
