"""Runs of language models through the command line: stages, sources, teachers, caches, and what they leave behind."""

import json
import math
import re
from functools import partial
from itertools import pairwise

import pytest
import torch

import kdlab
from helpers.tiny import QUIET, curve, farthest, mistake, result, same, train, weights
from helpers.tiny_text import prose, write_gpt2, write_pairs, write_rows, write_wikitext
from kdlab.batch_transforms.on_policy import GeneratedText
from kdlab.cli.main import main
from kdlab.data import arithmetic
from kdlab.experiment import evaluation, teacher_cache
from kdlab.functional import dense
from kdlab.inference.predict import load_model
from kdlab.models import CausalLM
from kdlab.models.transforms.layer_subset import spaced
from kdlab.tasks import tokens_per_second

SUMS = (
    *("experiment=reasoning_arithmetic", "student=gpt_tiny", "student.settings.n_layer=1", "teacher=gpt_tiny"),
    *("data.train=96", "data.val=10", "data.test=12", "data.max_steps=3", "data.context=64", "data.batch_size=24"),
    *("teacher.epochs=1", "epochs=1", "task.new_tokens=12", "baseline=false"),
    "task.max_questions=6",
)
"""Arithmetic with written steps: four optimizer steps an epoch, in about a second."""

ALIKE = "teacher.net.settings.n_layer=1"
"""A teacher that the student can start from."""

STILL = "optimizer.lr=1e-30"
"""A stage that moves nothing shows what it started from."""


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Measures the speed of every network hardly at all."""
    monkeypatch.setattr(evaluation, "tokens_per_second", partial(tokens_per_second, repeats=1, new_tokens=2))
    monkeypatch.setattr(evaluation.cost, "latency_ms", lambda *_: 1.0)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A GPT-2 of four layers and its tokenizer, and one whose output layer is padded."""
    folder = tmp_path_factory.mktemp("hub")
    write_gpt2(folder / "plain")
    write_gpt2(folder / "padded", layers=1, extra=20)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A file of prose."""
    path = tmp_path_factory.mktemp("corpus") / "prose.txt"
    path.write_text(prose(5000))
    return path


def text(corpus, *words):
    """Running text by characters, by two tiny networks."""
    return (
        *("experiment=lm_shakespeare", "data=text", f"data.path={corpus}", "data.tokenizer=characters"),
        *("data.context=32", "student=gpt_tiny", "student.settings.n_layer=1", "teacher=gpt_tiny", "teacher.epochs=1"),
        *("epochs=1", "task.new_tokens=8", "baseline=false", *words),
    )


def log_of(run):
    return (run / "run.log").read_text()


def watch(monkeypatch, look):
    """Have ``look(source, before, after, student, teacher, task)`` called after each batch that a source saw."""
    plain = GeneratedText.__call__

    def watched(self, batch, student, teacher, task, *more):
        found = plain(self, batch, student, teacher, task, *more)
        look(self, batch, found[0], student, teacher, task)
        return found

    monkeypatch.setattr(GeneratedText, "__call__", watched)


def lines(batch):
    """Each sequence of a batch as (prompt, what the network reads of the rest)."""
    ids, where = batch.inputs["input_ids"], batch.loss_mask
    first, last = where.int().argmax(1), where.shape[1] - where.flip(1).int().argmax(1)
    return [(row[: f + 1].tolist(), row[f + 1 : end].tolist()) for row, f, end in zip(ids, first, last, strict=True)]


# ---- stages


def test_the_second_stage_starts_from_the_first_ones_best_weights(place):
    stages = f"stages={{soft: ['loss.alpha=1'], real: ['loss.alpha=0', 'init=previous', '{STILL}']}}"
    run = train(place, "soft_real", *SUMS, stages)
    soft, real = (run / "stages" / name for name in ("soft", "real"))
    assert farthest(weights(soft), weights(real)) < 1e-20 and same(weights(real), weights(run))
    found = result(run)
    assert found["steps"] == 2 * 4 and found["epochs"] == 2
    assert found["models"]["soft"]["test"]["ppl"] == pytest.approx(found["models"]["student"]["test"]["ppl"], rel=1e-5)
    assert curve(soft, "train/loss") == pytest.approx(curve(soft, "train/kl"), rel=1e-5)
    assert curve(real, "train/loss") == pytest.approx(curve(real, "train/ce"), rel=1e-5)


def test_the_baseline_has_the_budget_of_all_stages(place):
    stages = "stages={soft: ['loss.alpha=1', 'epochs=2'], real: ['loss.alpha=0', 'init=previous', 'epochs=1']}"
    run = train(place, "budget", *SUMS, stages, "baseline=true", "seed=3")
    newest = max((place / "baselines").glob("gpt_tiny-*/result.json"), key=lambda file: file.stat().st_mtime_ns).parent
    assert result(newest)["epochs"] == 3 and len(curve(newest, "train/loss")) == result(run)["steps"] == 12


def test_sequence_level_then_on_policy(place, monkeypatch):
    """The teacher's own most probable text as labels, then the student's without any."""
    seen = {"teacher": 0, "student": 0}

    def look(source, before, after, student, teacher, task):
        seen[source.writer] += 1
        assert [prompt for prompt, _ in lines(before)] == [prompt for prompt, _ in lines(after)]
        assert [rest for _, rest in lines(before)] != [rest for _, rest in lines(after)]
        sizes = after.loss_mask.sum(1)
        assert torch.allclose(after.weight, (1 / sizes).repeat_interleave(sizes).to(after.weight))
        said = teacher(after).logits if source.writer == "teacher" else task.outputs(student, after).logits
        first = dense(said).argmax(-1)
        if source.writer == "teacher":
            assert torch.equal(first, after.targets)
        else:
            assert (after.targets == -100).all()
            for rows, (_, rest) in zip(first.split(sizes.tolist()), lines(after), strict=True):
                assert rows[:-1].tolist() == rest

    watch(monkeypatch, look)
    said = "['batch_transform=sequence_level', 'batch_transform.new_tokens=12', 'loss=[ce]']"
    own = (
        "['batch_transform=on_policy', 'loss=[reverse_kl]', 'init=previous', 'batch_transform.temperature=0', "
        "'batch_transform.fraction=1']"
    )
    run = train(place, "said_own", *SUMS, f"stages={{said: {said}, own: {own}}}")
    assert seen == {"teacher": 4, "student": 4}
    first, second = (run / "stages" / name for name in ("said", "own"))
    for stage in (first, second):
        assert curve(stage, "train/own") == [1.0] * 4
        assert all(0 < length <= 64 for length in curve(stage, "train/own_length"))
        assert all(0 <= share <= 1 for share in curve(stage, "train/own_ended") + curve(stage, "train/own_truncated"))
    assert all(value > 0 for value in curve(first, "train/ce"))
    assert curve(second, "train/ce") == [], "no step has a label"
    assert all(value > 0 for value in curve(second, "train/reverse_kl"))


def test_on_policy_steps_are_mixed_with_data_by_lambda(place):
    words = (*SUMS, "batch_transform=on_policy", "loss=reverse_kl", "batch_transform.new_tokens=4", "epochs=3")
    run = train(place, "lambda", *words, "batch_transform.fraction=0.5")
    own = curve(run, "train/own")
    assert set(own) == {0.0, 1.0} and 2 <= sum(own) <= 10
    assert "batch_transform writes sequences that nobody has seen before" in log_of(run)
    data = train(place, "lambda_0", *words, "batch_transform.fraction=0")
    plain = train(
        place, "lambda_none", *(word for word in words if not word.startswith("batch_transform")), "teacher.cache=off"
    )
    assert same(weights(data), weights(plain)) and not same(weights(data), weights(run))


def test_lora_in_one_stage_and_all_weights_in_the_next(place):
    run = train(
        place, "lora", *SUMS, ALIKE, f"stages={{low: [init=teacher, adapter=lora], full: [init=previous, {STILL}]}}"
    )
    low, full = (run / "stages" / name for name in ("low", "full"))
    assert (low / "adapter" / "adapter_config.json").exists() and not (full / "adapter").exists()
    merged, _ = load_model(low)
    assert farthest(weights(low), weights(full)) < 1e-20
    start = train(place, "lora_start", *SUMS, ALIKE, "init=teacher", STILL)
    plain, _ = load_model(start)
    moved = {key: (value - weights(start)[key]).abs().max() for key, value in weights(low).items()}
    changed = {key for key, most in moved.items() if most > 1e-20}
    assert changed and all("attn" in key or "mlp" in key for key in changed), changed
    from peft import PeftModel

    ids = torch.arange(20)[None] % 12
    with torch.no_grad():
        expected, before = dense(merged(ids)), dense(plain(ids))
        adapted = PeftModel.from_pretrained(plain.net, str(low / "adapter")).eval()
        found = adapted(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(before, expected, atol=1e-5)


def test_a_lora_run_deploys_merged_weights_and_so_does_its_baseline(place):
    run = train(place, "lora_alone", *SUMS, ALIKE, "init=teacher", "adapter=lora", "adapter.rank=2", "baseline=true")
    found = result(run)["models"]
    assert found["student"]["parameters"] == found["baseline"]["parameters"]
    assert not any("lora" in key for key in weights(run))
    net, _ = load_model(run)
    assert sum(p.numel() for p in net.parameters()) == found["student"]["parameters"]
    assert found["student"]["val"]["ppl"] == pytest.approx(min(curve(run, "val/ppl")), rel=1e-4)


# ---- what a student starts from


def test_a_student_cut_from_its_teacher(place, hub, tmp_path):
    write_wikitext(tmp_path, "wikitext-103")
    words = (
        *("experiment=distilgpt2_wikitext", f"data.root={tmp_path}", f"data.tokenizer={hub / 'plain'}"),
        *(f"teacher.net.name={hub / 'plain'}", "teacher.net.settings={}", "data.context=32", "epochs=1", STILL),
        "student.settings={n_layer: 2, n_head: 2, n_embd: 16}",
    )
    run = train(place, "cut", *words)
    teacher, held = CausalLM(name=str(hub / "plain"), vocab_size=300).state_dict(), weights(run)
    assert spaced(2, 4) == [0, 3]
    for key, value in held.items():
        block = re.sub(r"\.h\.1\.", ".h.3.", key)
        assert torch.allclose(value, teacher[block][: len(value)], atol=1e-12), key
    found = result(run)["models"]
    assert found["baseline"]["test"]["ppl"] == pytest.approx(found["student"]["test"]["ppl"]), "both start alike"
    assert found["teacher"]["seconds"] is None and found["student"]["test"]["ppl_word"] > 1
    points = [json.loads(line) for line in (run / "curves.jsonl").read_text().splitlines()]
    for point in (point for point in points if "train/loss" in point):
        total = 2 * point["train/ce"] + 5 * point["train/kl"] + point["train/cosine"]
        assert point["train/loss"] == pytest.approx(total, rel=1e-4)


def test_a_cut_student_that_learns_from_labels_alone(place):
    run = train(place, "cut_labels", *SUMS, "method=finetune", "loss=ce", "init=layer_subset", "baseline=true", STILL)
    models = result(run)["models"]
    assert models["teacher"] is None and models["baseline"]["parameters"] == models["student"]["parameters"]
    assert models["baseline"]["test"]["ppl"] != models["student"]["test"]["ppl"], "it starts fresh"


# ---- the teacher's cache


@pytest.mark.parametrize(("words", "says"), [("top_k=8", "8 most probable"), ("draws=8", "8 drawn")])
def test_a_sparse_cache_is_used_and_used_again(place, monkeypatch, words, says):
    run = train(place, f"sparse_{words[:3]}", *SUMS, f"teacher.{words}")
    assert f"cached teacher: {says} classes of " in log_of(run) and result(run)["seconds"]["cache"] > 0
    size = int(re.search(r"(\d+) bytes a token", log_of(run))[1])
    assert size < 100
    monkeypatch.setattr(teacher_cache, "write_tokens", lambda *_: pytest.fail("the cache was written again"))
    again = train(place, f"sparse_{words[:3]}", *SUMS, f"teacher.{words}", "seed=0", "loss.alpha=0.5", "epochs=2")
    folder = re.search(r"bytes a token \((.*)\)", log_of(run))[1]
    assert folder in log_of(again)
    assert all(map(math.isfinite, curve(again, "train/kl"))) and all(x > 0 for x in curve(run, "val/ppl"))
    found = result(run)["models"]["student"]["test"]
    assert "kl" not in found and ("kl_top8" in found) == (words == "top_k=8")


def test_the_cache_of_a_whole_vocabulary_gives_the_live_ones_loss(place):
    live = train(place, "whole_live", *SUMS, "teacher.cache=off", "loss.alpha=1")
    cached = train(place, "whole_cached", *SUMS, "loss.alpha=1")
    assert "cached teacher: logits of all classes" in log_of(cached) and "teacher.cache=off asks" in log_of(live)
    assert "MiB of float32" in log_of(cached)
    assert curve(cached, "train/kl") == pytest.approx(curve(live, "train/kl"), rel=1e-4, abs=1e-6)
    assert curve(cached, "val/kl") == pytest.approx(curve(live, "val/kl"), rel=1e-4, abs=1e-6)
    assert farthest(weights(live), weights(cached)) < 1e-4


def test_padding_and_packing_do_not_miss_the_cache(place):
    padded = train(place, "packing", *SUMS, "teacher.top_k=8", "epochs=2")
    packed = train(place, "packing", *SUMS, "teacher.top_k=8", "data.pack=true", "trainer.accumulate=2", "epochs=2")
    assert "8 most probable" in log_of(packed)
    for key in ("train/ce", "train/kl"):
        assert curve(packed, key) == pytest.approx(curve(padded, key), rel=1e-3)
    assert farthest(weights(padded), weights(packed)) < 1e-3


def test_a_vocabulary_too_large_to_keep_whole_is_live(place, hub, corpus):
    words = text(corpus, f"data.tokenizer={hub / 'plain'}", "loss=total_variation", "teacher.epochs=1")
    run = train(place, "large", *words)
    assert "it would hold 300 numbers a token (teacher.top_k=32 keeps the most probable ones)" in log_of(run)


# ---- vocabularies


@pytest.mark.parametrize("cache", ["teacher.cache=off", "teacher.top_k=300"])
def test_a_padded_vocabulary_is_cut_to_the_shared_ids(place, hub, corpus, cache):
    words = text(corpus, f"data.tokenizer={hub / 'padded'}", "teacher=hf_causal", f"teacher.net.name={hub / 'padded'}")
    run = train(place, "padded", *(word for word in words if word != "teacher.epochs=1"), cache)
    assert len(re.findall("320 outputs, cut to the 300 shared ids and renormalised", log_of(run))) == 1
    assert all(value > 0 for value in curve(run, "train/kl"))
    assert result(run)["models"]["teacher"]["seconds"] is None


def test_unlike_tokenizers(place, corpus, capsys, tmp_path):
    unlike = "teacher.data.tokenizer=bytes"
    run = train(place, "unlike", *text(corpus, unlike, "loss=uld"))
    assert all(0 < value <= 2 for value in curve(run, "train/uld"))
    assert "cached teacher" not in log_of(run)
    found = result(run)["models"]
    assert 1 < found["teacher"]["test"]["ppl"] < 257, "in its own tokens"
    own = max((place / "teachers").glob("gpt_tiny-*/result.json"), key=lambda file: file.stat().st_mtime_ns)
    assert found["teacher"]["val"]["ppl"] == pytest.approx(result(own.parent)["val"]["ppl"], rel=1e-4)
    assert not {"agreement", "kl"} & set(found["student"]["test"])
    said = mistake(capsys, [*QUIET, *text(corpus, unlike)], tmp_path / "out")
    assert said.startswith("teacher.data: its tokenizer (257 tokens) is not that of data (")
    assert "loss=uld" in said and "data=traces" in said


def test_a_run_teaches_by_its_own_tokenizer_or_not_at_all(place, corpus, capsys, tmp_path):
    def learner(tokenizer):
        words = text(corpus, "method=finetune", "loss=ce", "teacher=none")
        words = [word for word in words if not word.startswith("teacher.")]
        return train(place, f"learner_{tokenizer}", *words, f"data.tokenizer={tokenizer}", "data.context=48")

    other, same_tokens = learner("bytes"), learner("characters")
    one_layer = "teacher.net.settings.n_layer=1"
    words = text(corpus, one_layer, f"teacher.checkpoint={other}")
    said = mistake(capsys, [*QUIET, *words], tmp_path / "out")
    assert said.startswith("teacher.checkpoint: its tokenizer (257 tokens) is not that of data (")
    run = train(place, "other_tokens", *words, "loss=uld")
    assert "live teacher with a tokenizer of its own (257 tokens" in log_of(run)
    found = result(run)["models"]["teacher"]["test"]["ppl"]
    # its context is 48, so that it reads lines of 32 as well; it is measured in its own tokens
    assert 1 < found < 257
    run = train(place, "same_tokens", *text(corpus, one_layer, f"teacher.checkpoint={same_tokens}"))
    assert result(run)["models"]["teacher"]["test"]["ppl"] < 60
    said = mistake(capsys, [*QUIET, *text(corpus, one_layer, f"teacher.checkpoint={same_tokens}"), "data.context=64"])
    assert said.startswith("teacher.net.context: 48, and data.context is 64")
    words = text(corpus, "init=pretrained", "pretrained=trained", f"pretrained.checkpoint={other}")
    assert "pretrained.checkpoint: its tokenizer (257 tokens)" in mistake(capsys, [*QUIET, *words])


# ---- what is measured


def test_another_domain_is_measured_too(place, corpus, tmp_path):
    write_wikitext(tmp_path)
    other = f"data.ood={{_target_: kdlab.data.wikitext, root: '{tmp_path}', name: wikitext-2}}"
    run = train(place, "ood", *text(corpus, other, "baseline=true"))
    for role in ("student", "teacher", "baseline"):
        assert result(run)["models"][role]["ood"]["ppl"] > 1
    student = result(run)["models"]["student"]
    assert student["ood"]["kl"] > 0 and student["ood"]["ppl"] != student["test"]["ppl"]
    mixed = train(place, "outside_mix", *text(corpus, other, "teacher.data.mix=['${data.ood}']"))
    assert result(mixed)["models"]["teacher"]["ood"]["ppl"] < result(run)["models"]["teacher"]["ood"]["ppl"]


def test_exact_match_is_told_apart_by_the_number_of_steps(place):
    run = train(place, "groups", *SUMS, "task.passes=[1,2]", "task.max_questions=null")
    for role in ("student", "teacher"):
        found = result(run)["models"][role]["test"]
        groups = {name: value for name, value in found.items() if name.startswith("em/")}
        assert groups.keys() == {"em/2", "em/3"} and 0 <= found["em"] <= 1
        assert min(groups.values()) <= found["em"] <= max(groups.values())
        assert 0 <= found["pass@1"] <= found["pass@2"] <= 1 and 0 < found["new_tokens"] <= 12


def test_a_student_that_knows_the_answers_is_right(place, tmp_path):
    """One answer to all questions: exact match finds what is right."""
    rows = [{"question": word, "reasoning": None, "answer": "ba", "gold": "ba"} for word in ("ab", "cd", "bc", "da")]
    asked = [write_rows(tmp_path / f"{name}.jsonl", some) for name, some in (("heart", rows[:2]), ("new", rows[2:]))]
    data = ("data=traces", f"data.path={asked[0]}", f"data.test_path={asked[1]}", "data.val=0", "data.form=answer")
    data += ("data.complete=false",)
    alone = ("method=finetune", "loss=ce", "teacher=none", "task.new_tokens=16", "epochs=60", "optimizer.lr=0.01")
    sums = (word for word in SUMS if not word.startswith(("teacher", "data.")))
    run = train(place, "heart", *sums, *alone, *data, "student.settings.n_layer=2")
    found = result(run)["models"]["student"]["test"]
    assert found["em"] == 1 and found["ended"] == 1 and found["acc"] == 1 and found["ppl"] < 1.2


def test_samples_are_written_to_a_file_and_to_tensorboard(place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(place, "samples", *SUMS, "logger=tensorboard", "epochs=2")
    table = (run / "samples.md").read_text()
    assert table.startswith("| ") and table.count("\n") == 6 and "+" in table
    events = EventAccumulator(str(run)).Reload()
    assert "val/samples/text_summary" in events.Tags()["tensors"]
    shown = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("val/samples/text_summary")]
    assert len(shown) == 2 and shown[-1].strip() == table.strip()
    assert {"train/kl", "val/ppl"} <= set(events.Tags()["scalars"])


def test_the_course_is_judged_by_perplexity(place, corpus):
    run = train(place, "judged", *text(corpus, "epochs=4", "optimizer.lr=0.3", "scheduler=constant"))
    found, judged = result(run), curve(run, "val/ppl")
    assert len(judged) == 4 and judged[found["best_epoch"]] == min(judged)
    assert found["objective"] == pytest.approx(min(judged), rel=1e-4)
    assert found["models"]["student"]["val"]["ppl"] == pytest.approx(math.exp(found["models"]["student"]["val"]["ce"]))


# ---- what a finished run is good for


def test_predict_and_compare(place, corpus, capsys):
    runs = [train(place, f"finished_{seed}", *text(corpus, f"seed={seed}", "baseline=true")) for seed in (0, 1)]
    capsys.readouterr()
    assert main(["predict", str(runs[0]), "the king", "--new-tokens", "5"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("the king") and len(said) == len("the king") + 5 + 1
    assert main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "ppl" in said and "student" in said and "baseline" in said
    for run in runs:
        for role in ("student", "teacher", "baseline"):
            assert f"{result(run)['models'][role]['test']['ppl']:.2f}" in said


def test_evaluate_and_check_a_teacher(place, hub, corpus, capsys):
    words = text(corpus, f"data.tokenizer={hub / 'plain'}", "teacher=hf_causal", f"teacher.net.name={hub / 'plain'}")
    words = [word for word in (*QUIET, *words, f"output={place}") if word != "teacher.epochs=1"]
    assert main(["evaluate", *words]) == 0
    assert "ppl" in capsys.readouterr().out
    assert main(["check", *words]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_distill_takes_batches_of_sequences(tmp_path):
    data = arithmetic(train=64, val=16, test=0, max_steps=2, batch_size=16, context=64, tokenizer="characters")
    data.to("cpu")
    teacher, student = (
        CausalLM(settings={"n_layer": layers, "n_head": 2, "n_embd": 16}, **data.network_kwargs) for layers in (2, 1)
    )
    found = kdlab.distill(
        student,
        teacher,
        data.train_dataloader(),
        data.val_dataloader(),
        loss="reverse_kl",
        epochs=3,
        folder=tmp_path,
        trainer={"accelerator": "cpu", "progress": "none", "threads": 1},
    )
    assert found.student is student and found.val["ppl"] < data.vocab_size and 0 <= found.best_epoch <= 2
    assert found.val["ppl"] == pytest.approx(math.exp(found.val["ce"])) and found.val["kl"] > 0
    assert "agreement" in found.val and found.teacher_val["ppl"] > 1


# ---- written reasoning


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What a teacher wrote about sums: half of it wrong, two traces a question."""
    rows = []
    for i in range(30):
        for right in (True, False):
            answer = str(i + 2 + (not right))
            rows.append({"question": f"{i}+2", "reasoning": f"{i} and 2", "answer": answer, "gold": str(i + 2)})
    return write_rows(tmp_path_factory.mktemp("written") / "traces.jsonl", rows)


@pytest.mark.parametrize("form", ["answer", "both"])
def test_traces_with_soft_targets_of_a_white_box_teacher(place, written, form):
    words = ("data=traces", f"data.path={written}", f"data.form={form}", "data.keep=right", "data.context=64")
    run = train(place, f"traces_{form}", *(word for word in SUMS if not word.startswith("data.")), *words)
    found = result(run)
    assert (
        f"{24 * (1 + (form == 'both'))} sequences of " in found["data"] and "em" in found["models"]["student"]["test"]
    )
    assert all(value > 0 for value in curve(run, "train/kl"))
    assert ("ce/reasoning" in found["models"]["student"]["test"]) == (form != "answer")


def test_segments_weigh_what_they_are_told(place):
    """With the steps at 0 only answers are rows; so the tokens to predict are fewer, and the loss is another."""
    all_rows = train(place, "weights_all", *SUMS)
    answers = train(place, "weights_answer", *SUMS, "data.segment_weights={reasoning: 0}")
    tokens = [int(re.search(r"\((\d+) tokens", result(run)["data"])[1]) for run in (all_rows, answers)]
    assert tokens[1] < tokens[0] / 2
    assert "ce/reasoning" in result(all_rows)["models"]["student"]["test"]
    assert "ce/reasoning" not in result(answers)["models"]["student"]["test"]


# ---- text to text


def test_text_to_text(place, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    small = ("d_model=16", "d_kv=8", "d_ff=16", "num_layers=1", "num_decoder_layers=1", "num_heads=2")
    words = (
        *("task=text_to_text", "data=pairs", f"data.path={pairs}", "data.context=16", "task.new_tokens=6"),
        *("student=t5_tiny_student", "teacher=t5_tiny_teacher", "teacher.epochs=1", "epochs=2", "trainer.accumulate=2"),
        *(f"{net}.settings.{word}" for net in ("student", "teacher.net") for word in small),
        *("loss=balanced", "temperature=none", "optimizer=adamw_lm", "task.transcripts=true", "data.batch_size=8"),
        f"data.tokenizer_from=[{pairs}]",
    )
    run = train(place, "pairs", *words)
    found = result(run)["models"]
    assert {"ppl", "em", "wer", "cer", "agreement"} <= set(found["student"]["test"])
    assert found["baseline"]["parameters"] == found["student"]["parameters"]
    assert "cached teacher: logits of all classes" in log_of(run)
    own = train(place, "pairs_own", *words, "batch_transform=on_policy", "loss=reverse_kl", "baseline=false")
    assert set(curve(own, "train/own")) <= {0.0, 0.5, 1.0} and max(curve(own, "train/own")) > 0
    assert main(["predict", str(run), "the 3"]) == 0


# ---- losses


TERMS = {"hidden_cosine": "cosine"}


@pytest.mark.parametrize("name", ["skew_reverse_kl", "jsd", "hidden_cosine"])
def test_every_divergence_trains(place, name):
    run = train(place, f"loss_{name}", *SUMS, f"loss={name}")
    values = curve(run, f"train/{TERMS.get(name, name)}")
    assert len(values) == 4 and all(math.isfinite(value) and value > 0 for value in values)
    assert all(a != b for a, b in pairwise(values))
