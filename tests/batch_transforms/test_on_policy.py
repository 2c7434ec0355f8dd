"""Text that networks write themselves: what a batch becomes, and that nothing but (seed, step, example) decides it."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdlab.batch_transforms.on_policy import GeneratedText, _Buffer
from kdlab.data.text import PROMPT, REASONING, RawText, Sequence, TextData, Tokenizer
from kdlab.data.text.datasets.arithmetic import arithmetic
from kdlab.errors import UserError
from kdlab.functional import SEGMENTS, Batch, SequenceBatch, StepTotals
from kdlab.losses import CrossEntropy, Objective, ReverseKL
from kdlab.models.transformers.causal_lm import CausalLM
from kdlab.tasks import LanguageModeling, TextToText
from kdlab.teachers import CrossTokenizerTeacher, FrozenTeacher

torch.set_num_threads(1)

VOCAB, EOS, CONTEXT = 12, 11, 20
ANSWER, TEXT = SEGMENTS.index("answer"), SEGMENTS.index("text")
TASK = LanguageModeling(VOCAB)


def gpt(seed=0, vocab=VOCAB):
    torch.manual_seed(seed)
    settings = {"n_layer": 1, "n_head": 2, "n_embd": 16}
    net = CausalLM(settings=settings, vocab_size=vocab, context=CONTEXT, eos_id=EOS, pad_id=EOS)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.25)
    return net


def own(**options):
    defaults = {"eos_id": EOS, "pad_id": EOS, "vocab_size": VOCAB, "context": CONTEXT, "fraction": 1.0, "new_tokens": 5}
    return GeneratedText(**{**defaults, **options})


class Sequences:
    """Questions: the prompt of example i has 2 + i % 3 tokens, its answer four; or plain text of seven."""

    def __init__(self, count=8, text=False):
        torch.manual_seed(1)
        self.prompts = [0 if text else 2 + number % 3 for number in range(count)]
        self.ids = [torch.randint(11, (prompt + 7 if text else prompt + 4,)) for prompt in self.prompts]
        self.segment = TEXT if text else ANSWER
        self.share = None

    def batch(self, examples, window=None):
        ids = [self.ids[e] for e in examples]
        width = max(map(len, ids)) - 1
        read = torch.stack([nn.functional.pad(one[:-1], (0, width - len(one) + 1), value=EOS) for one in ids])
        first = [max(self.prompts[e] - 1, 0) for e in examples]
        where = torch.tensor([[f <= t < len(one) - 1 for t in range(width)] for f, one in zip(first, ids, strict=True)])
        targets = torch.cat([one[f + 1 :] for f, one in zip(first, ids, strict=True)])
        rows = len(targets)
        return SequenceBatch(
            {"input_ids": read, "position_ids": torch.arange(width).expand_as(read)},
            targets,
            torch.tensor([[e, 0] for e in examples]),
            torch.ones(rows),
            loss_mask=where,
            segment=torch.full((rows,), self.segment),
            prompts=torch.tensor([self.prompts[e] for e in examples]),
            sequence_weight=None if self.share is None else self.share[list(examples)],
            window=window,
        )


def greedy(net, prompt, most=5):
    ids = prompt.tolist()
    with torch.no_grad():
        while len(ids) < min(len(prompt) + most, CONTEXT + 1) and (len(ids) == len(prompt) or ids[-1] != EOS):
            ids.append(int(net(torch.tensor([ids])).dense()[0, -1, :VOCAB].argmax()))
    return ids[len(prompt) :]


def texts(batch):
    """example → (prompt, continuation), read off a batch by its rows."""
    found = {}
    ids = batch.inputs.get("decoder_input_ids", batch.inputs["input_ids"])
    for row, at in enumerate(batch.loss_mask):
        first, last = int(at.nonzero()[0]), int(at.nonzero()[-1])
        found[int(batch.example_id[row, 0])] = (ids[row, : first + 1].tolist(), ids[row, first + 1 : last + 1].tolist())
    return found


def call(source, batch, student, teacher=None, seed=0, step=0, part=0):
    return source(batch, student, teacher, TASK, seed, step, part)


# ---- what a batch becomes


@pytest.mark.parametrize("writer", ["student", "teacher"])
def test_answers_are_replaced(writer):
    nets = {"student": gpt(0).eval(), "teacher": gpt(1).eval()}
    data = Sequences()
    found, curves = call(own(writer=writer, temperature=0.0), data.batch(range(4)), *nets.values())
    lengths = []
    for row in range(4):
        prompt = data.ids[row][: data.prompts[row]]
        expected = greedy(nets[writer], prompt)
        lengths.append(len(expected))
        ids = [*prompt.tolist(), *expected]
        read, rows = found.inputs["input_ids"][row].tolist(), found.loss_mask[row].tolist()
        assert read == ids[:-1] + [EOS] * (len(read) - len(ids) + 1)
        assert rows == [len(prompt) - 1 <= t < len(ids) - 1 for t in range(len(read))]
        at = slice(sum(lengths[:-1]), sum(lengths))
        assert found.targets[at].tolist() == (expected if writer == "teacher" else [-100] * len(expected))
        torch.testing.assert_close(found.weight[at], torch.full((len(expected),), 1 / len(expected)))
    assert len(found) == sum(lengths) and set(found.segment.tolist()) == {ANSWER}
    assert found.inputs["position_ids"].tolist() == [list(range(found.loss_mask.shape[1]))] * 4
    assert found.example_id.tolist() == [[n, 0] for n in range(4)]
    assert found.window == StepTotals(4.0 if writer == "teacher" else 0.0, 4.0, 1, 4.0)
    ended = sum(greedy(nets[writer], data.ids[n][: data.prompts[n]])[-1] == EOS for n in range(4)) / 4
    assert {name: float(value) for name, value in curves.items()} == pytest.approx(
        {"own": 1.0, "own_length": sum(lengths) / 4, "own_ended": ended, "own_truncated": 1 - ended}
    )


def test_running_text_keeps_its_first_tokens_and_stops_at_the_context():
    data, net = Sequences(text=True), gpt().eval()
    with torch.no_grad():
        net.net.transformer.wte.weight[EOS] = 0.0
    found = texts(call(own(prompt=4, temperature=0.0, new_tokens=50), data.batch([0, 5]), net)[0])
    for example in (0, 5):
        prompt, text = found[example]
        assert prompt == data.ids[example][:4].tolist() and len(prompt) + len(text) == CONTEXT
        assert text == greedy(net, data.ids[example][:4], 50)[:-1]
    short = texts(call(own(prompt=50), data.batch([0]), net)[0])
    assert short[0][0] == data.ids[0][:-1].tolist()


def test_a_short_question_does_not_show_its_answer():
    data = Sequences()
    found = texts(call(own(prompt=16), data.batch(range(8)), gpt())[0])
    assert [prompt for prompt, _ in found.values()] == [data.ids[e][: data.prompts[e]].tolist() for e in range(8)]


def test_sequences_without_rows_are_left_out():
    data = Sequences()
    batch = data.batch([3, 4, 5])
    gone = batch.loss_mask[1].sum()
    before = batch.loss_mask[0].sum()
    keep = torch.ones(len(batch), dtype=torch.bool)
    keep[before : before + gone] = False
    batch.loss_mask = batch.loss_mask & torch.tensor([True, False, True])[:, None]
    batch.targets, batch.weight, batch.segment = (x[keep] for x in (batch.targets, batch.weight, batch.segment))
    assert list(texts(call(own(), batch, gpt())[0])) == [3, 5]


def test_the_written_tokens_are_scored_where_they_were_drawn():
    """Cross-entropy on the teacher's text is minus the mean log-probability of each text, given its prompt."""
    student, teacher, data = gpt(0).eval(), gpt(1).eval(), Sequences()
    batch, _ = call(own(writer="teacher"), data.batch(range(5)), student, teacher)
    found = Objective({"ce": CrossEntropy()})(TASK.outputs(student, batch), None, batch).total
    expected, start = [], 0
    for example, (prompt, most) in texts(batch).items():
        size = len(most) + 1
        text = batch.targets[start : start + size].tolist()
        start += size
        assert text[:-1] == most and prompt == data.ids[example][: data.prompts[example]].tolist()
        ids, scores = prompt, []
        for token in text:
            scores.append(-student(torch.tensor([ids])).dense()[0, -1].log_softmax(-1)[token])
            ids = [*ids, token]
        expected.append(torch.stack(scores).mean())
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_a_student_that_trains_writes_without_dropout_and_goes_on_training():
    data, student = Sequences(), gpt().train()
    student.net.transformer.drop.eval()  # as a frozen layer would be
    modes = [module.training for module in student.modules()]
    batch, _ = call(own(temperature=0.0), data.batch([0]), student)
    assert [module.training for module in student.modules()] == modes
    quiet = copy.deepcopy(student).eval()
    expected = greedy(quiet, data.ids[0][:2])
    assert texts(batch)[0][1] == expected[:-1]
    loss = Objective({"r": ReverseKL()})(TASK.outputs(student, batch), TASK.outputs(gpt(1), batch), batch).total
    loss.backward()
    assert all(p.grad is not None for p in student.parameters())


def test_padded_output_layers_write_only_what_is_in_the_vocabulary():
    net, data = gpt(vocab=16), Sequences()
    with torch.no_grad():
        net.net.transformer.wte.weight[VOCAB:] *= 10
    found = call(own(writer="teacher"), data.batch(range(8)), gpt(), net)[0]
    assert int(found.targets.max()) < VOCAB


class Echo(nn.Module):
    """An encoder-decoder that writes what it reads, then ends."""

    def forward(self, decoder_input_ids, input_ids, attention_mask=None):
        steps = decoder_input_ids.shape[1]
        ids = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, EOS)
        ids = nn.functional.pad(ids, (0, steps), value=EOS)[:, :steps]
        return SimpleNamespace(logits=nn.functional.one_hot(ids, VOCAB).float() * 50)


def test_an_encoder_goes_on_reading_what_it_read():
    given = torch.tensor([[1, 2, 3], [4, 5, 0]])
    inputs = {
        "input_ids": given,
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "decoder_input_ids": torch.tensor([[EOS, 7], [EOS, 8]]),
    }
    batch = SequenceBatch(
        inputs,
        torch.tensor([7, 8, 8, 9]),
        torch.tensor([[0, 0], [1, 0]]),
        segment=torch.full((4,), ANSWER),
        loss_mask=torch.ones(2, 2, dtype=torch.bool),
        prompts=torch.tensor([1, 1]),
    )
    found, curves = call(own(writer="teacher"), batch, Echo(), Echo())
    assert found.targets.tolist() == [1, 2, 3, EOS, 4, 5, EOS]
    assert found.inputs["decoder_input_ids"].tolist() == [[EOS, 1, 2, 3], [EOS, 4, 5, EOS]]
    assert found.inputs["input_ids"].equal(given) and "position_ids" not in found.inputs
    assert float(curves["own_length"]) == 3.5 and float(curves["own_ended"]) == 1.0
    assert TextToText(VOCAB).outputs(Echo(), found).logits.argmax(-1).equal(found.targets)


# ---- what is given, and how much it weighs


def reasoned(weights, **options):
    """Questions, the steps to their answers, and the answers, as a data set; of weight 1 and 0.1."""
    tokenizer, draw = Tokenizer.bytes(), torch.Generator().manual_seed(2)

    def some(*lengths):
        pieces = [torch.randint(256, (n,), generator=draw).tolist() for n in lengths]
        return list(zip(pieces, (PROMPT, REASONING, ANSWER), strict=True))

    made = [Sequence.of(some(1 + n % 4, 3 + n % 2, 2), weight=(1.0, 0.1)[n % 2]) for n in range(12)]
    source = RawText("made", tokenizer, {"train": made})
    options = {"context": CONTEXT, "batch_size": 6, "segment_weights": weights} | options
    return made, TextData(source, **options)


@pytest.mark.parametrize("weights", [{}, {"prompt": 0.5}, {"reasoning": 0.0}, {"prompt": 1.0, "answer": 0.0}])
def test_the_question_is_given_and_nothing_else_whatever_tokens_weigh(weights):
    made, data = reasoned(weights)
    net = CausalLM(settings={"n_layer": 1, "n_head": 2, "n_embd": 16}, **data.network_kwargs)
    source, seen = GeneratedText(**data.network_kwargs, fraction=1.0, new_tokens=4), {}
    for step, batch in enumerate(data.train_dataloader()):
        found, _ = source(batch, net, None, None, 0, step)
        seen |= texts(found)
        assert found.window == StepTotals(0.0, *(found.window.rows, 1, found.window.rows))
    assert len(seen) == 12
    for example, (prompt, _) in seen.items():
        one = made[example]
        assert prompt == one.ids[one.segments == PROMPT].tolist()


def test_a_sequence_weighs_what_it_weighs_in_the_data():
    made, data = reasoned({"answer": 3.0})
    net = CausalLM(settings={"n_layer": 1, "n_head": 2, "n_embd": 16}, **data.network_kwargs)
    for accumulate in (1, 2):
        data.to("cpu", accumulate=accumulate)
        source = GeneratedText(**data.network_kwargs, writer="teacher", fraction=1.0, new_tokens=4)
        found = [source(batch, net, net, None, 0, 0)[0] for batch in data.train_dataloader()][:accumulate]
        total = 0.0
        for batch in found:
            weights = iter(batch.weight.split(batch.loss_mask.sum(1).tolist()))
            for example in batch.example_id[:, 0].tolist():
                each = next(weights)
                torch.testing.assert_close(each, torch.full_like(each, made[example].weight / len(each)))
                total += made[example].weight
        for batch in found:
            assert batch.window[2] == accumulate
            assert [batch.window[n] for n in (0, 1, 3)] == pytest.approx([total] * 3, rel=1e-6)


# ---- what decides


def test_whether_a_step_has_own_text_depends_on_seed_and_step():
    data, net = Sequences(), gpt()
    source = own(fraction=0.3, new_tokens=1)

    def chosen(batch, seed, steps=150):
        return [float(call(source, batch, net, seed=seed, step=step)[1]["own"]) for step in range(steps)]

    first = chosen(data.batch([0]), 0)
    assert first == chosen(data.batch([3, 4]), 0) and first != chosen(data.batch([0]), 1)
    assert 0.2 < sum(first) / len(first) < 0.4
    batch = data.batch([0])
    same, curves = call(source, batch, net, step=first.index(0.0))
    assert (
        same is batch
        and curves["own_length"].isnan()
        and set(curves)
        == {
            "own",
            "own_length",
            "own_ended",
            "own_truncated",
        }
    )


def test_the_fraction_may_follow_training():
    source, batch, net = own(fraction={"start": 0.0, "end": 1.0}), Sequences().batch([0]), gpt()
    shares = []
    for source.progress in (0.0, 1.0):
        shares.append({float(call(source, batch, net, step=step)[1]["own"]) for step in range(20)})
    assert shares == [{0.0}, {1.0}]


def written_by(groups, step=3, seed=0, **options):
    data, net, source = Sequences(), gpt(), own(**options)
    found = {}
    for part, group in enumerate(groups):
        batch = data.batch(group, StepTotals(8.0, 8.0, len(groups), 8.0))
        found |= texts(call(source, batch, net, seed=seed, step=step, part=part)[0])
    return found


def test_a_text_depends_on_seed_step_and_example_alone():
    whole = written_by([range(8)])
    assert whole == written_by([range(4), range(4, 8)]) == written_by([[6, 1], [7], [0, 5, 2], [4, 3]])
    assert whole != written_by([range(8)], step=4) and whole != written_by([range(8)], seed=1)
    assert len({tuple(text) for _, text in whole.values()}) > 4


def test_neither_accumulation_nor_processes_change_the_texts_of_a_loader():
    data, net = arithmetic(train=48, val=0, test=8, context=96, batch_size=8, tokenizer="characters"), None
    found = []
    for accumulate, world in ((1, 1), (2, 1), (1, 2), (2, 2)):
        seen = {}
        for rank in range(world):
            data.to("cpu", accumulate=accumulate, rank=rank, world=world)
            net = net or CausalLM(settings={"n_layer": 1, "n_head": 2, "n_embd": 16}, **data.network_kwargs)
            source = GeneratedText(**data.network_kwargs, fraction=0.5, new_tokens=6)
            for number, batch in enumerate(data.train_dataloader()):
                step, part = divmod(number, accumulate)
                batch, curves = source(batch, net, None, None, 0, step, part)
                if curves["own"]:
                    assert batch.window == StepTotals(0.0, 8.0, accumulate * world, 8.0)
                    seen |= {(step, example): text for example, text in texts(batch).items()}
        found.append(seen)
    assert 0 < len(found[0]) < 48 and found[1:] == found[:1] * 3


def test_tokens_are_drawn_from_the_students_distribution():
    count, steps, net = 300, 6, gpt().eval()
    data, source = Sequences(count), own(new_tokens=1, temperature=0.7, writer="teacher")
    data.ids, data.prompts = data.ids[:1] * count, data.prompts[:1] * count
    found = [call(source, data.batch(range(count)), net, net, step=step)[0].targets for step in range(steps)]
    chances = (net(data.ids[0][None, :2]).dense()[0, -1] / 0.7).softmax(-1).detach()
    shares = torch.cat(found).bincount(minlength=VOCAB) / (count * steps)
    assert ((shares - chances).abs() < 4 * (chances * (1 - chances) / (count * steps)).sqrt() + 1e-3).all()


@pytest.mark.parametrize("writer", ["student", "teacher"])
def test_gradients_do_not_depend_on_the_split(writer):
    data, teacher, gradients = Sequences(), gpt(1).eval(), []
    data.share = torch.tensor([1.0, 0.1, 2.0, 1.0, 0.1, 0.5, 1.0, 1.0])
    for groups in ([range(8)], [range(4), range(4, 8)], [range(3), range(3, 8)]):
        student, source = gpt().eval(), own(writer=writer)
        objective = Objective({"ce": CrossEntropy(), "r": ReverseKL()}, alpha=0.5)
        for part, group in enumerate(groups):
            batch = data.batch(group, StepTotals(32.0, 32.0, len(groups), float(data.share.sum())))
            batch, _ = call(source, batch, student, FrozenTeacher(teacher, TASK), step=2, part=part)
            losses = objective(TASK.outputs(student, batch), TASK.outputs(teacher, batch), batch)
            (losses.total / len(groups)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


def test_a_part_of_a_step_must_know_how_many_sequences_the_step_has():
    with pytest.raises(ValueError, match=r"StepTotals\.examples: 0"):
        call(own(), Sequences().batch([0, 1], StepTotals(8.0, 8.0, 2)), gpt())


# ---- the buffer


def sittings(source, steps, stop=None, groups=(range(8),), **options):
    """The texts of each step; the student changes all the time, and after ``stop`` another process goes on."""
    data, found = Sequences(), []
    for step in range(steps):
        if step == stop:
            file = io.BytesIO()
            torch.save(source.state_dict(), file)
            file.seek(0)
            source = own(**options)
            source.load_state_dict(torch.load(file, weights_only=True))
        net, seen = gpt(step), {}
        for group in groups:
            batch = data.batch(group, StepTotals(8.0, 8.0, len(groups), 8.0))
            seen |= texts(call(source, batch, net, step=step)[0])
        found.append(seen)
    return found


def test_the_buffer_gives_back_what_was_written():
    fresh = sittings(own(), 3)
    assert sittings(own(buffer=8, replay=0.0), 3) == fresh and fresh[1] != fresh[0]
    kept = sittings(own(buffer=8, replay=1.0), 3)
    assert kept == [fresh[0]] * 3
    few = sittings(own(buffer=3, replay=1.0), 2)[1]
    same = [example for example in range(8) if few[example] == fresh[0][example]]
    assert set(same) >= {5, 6, 7} and any(few[e] == fresh[1][e] != fresh[0][e] for e in range(5))


@pytest.mark.parametrize("options", [{"buffer": 8, "replay": 0.5}, {"buffer": 3, "replay": 0.7}, {"buffer": 0}])
def test_neither_a_resumed_run_nor_micro_batches_change_what_is_replayed(options):
    whole = sittings(own(**options), 6)
    for stop in (1, 3):
        assert sittings(own(**options), 6, stop, **options) == whole
    assert sittings(own(**options), 6, groups=(range(4, 8), range(4))) == whole


def test_what_goes_are_the_oldest_entries_and_only_where_there_is_no_room():
    def filled(buffer, steps):
        for step, examples in steps:
            buffer.begin(step)
            buffer.add(step, [(e, torch.tensor([e]).int(), torch.tensor([step, e]).int()) for e in examples])
        return buffer

    early, late = [(0, [7, 1, 4]), (1, [9, 3])], [(2, [4, 0]), (3, [6])]
    one = filled(_Buffer(5), early)
    before = one._entries
    one.begin(1.5)
    assert one._entries is before and list(before) == [7, 1, 4, 9, 3]
    resumed = _Buffer(5)
    resumed.load_state_dict(one.state_dict())
    for buffer in (one, resumed):
        assert filled(buffer, late).state_dict()["examples"].tolist() == [0, 3, 4, 6, 7, 9]
        buffer.begin(4)
        assert buffer.state_dict()["examples"].tolist() == [0, 3, 4, 6, 9]
        assert buffer.find(4, torch.tensor([4]).int()).tolist() == [2, 4]
        assert buffer.find(7, torch.tensor([7]).int()) is None


def test_another_prompt_of_the_same_example_is_not_answered_from_the_buffer():
    source, data = own(buffer=8, replay=1.0), Sequences()
    before = texts(call(source, data.batch([0]), gpt(), step=0)[0])
    data.ids[0] = (data.ids[0] + 1) % 11
    prompt, _ = texts(call(source, data.batch([0]), gpt(), step=1)[0])[0]
    assert prompt == data.ids[0][:2].tolist() != before[0][0]


def test_every_process_keeps_what_the_others_wrote(monkeypatch):
    data, shared = Sequences(), []
    dist = torch.distributed
    for name, value in (("is_available", True), ("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda value=value: value)

    def gather(into, mine):
        shared.append(mine)
        into[:] = [shared[0], mine]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    one, two = (own(buffer=8, replay=1.0) for _ in range(2))
    call(one, data.batch(range(4)), gpt(), step=0)
    call(two, data.batch(range(4, 8)), gpt(), step=0)
    assert two.state_dict()["examples"].tolist() == list(range(8))
    assert texts(call(two, data.batch(range(8)), gpt(5), step=1)[0]) == written_by([range(8)], step=0)


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"writer": "teachers"}, "batch_transform.writer: unknown writer 'teachers'; nearest: teacher"),
        ({"fraction": 1.5}, "batch_transform.fraction: 1.5; accepted: between 0 and 1"),
        ({"new_tokens": 0}, "batch_transform.new_tokens: 0; accepted"),
        ({"prompt": 0}, "batch_transform.prompt: 0; accepted"),
        ({"buffer": -1}, "batch_transform.buffer: -1; accepted"),
        ({"replay": 2.0}, "batch_transform.replay: 2.0; accepted"),
        ({"temperature": -1.0}, "batch_transform.temperature: -1.0; accepted"),
        ({"top_p": 0.0}, "batch_transform.top_p: 0.0; accepted"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        own(**options)


def test_batches_that_cannot_be_continued_are_refused():
    packed = Sequences().batch([0, 1])
    packed.inputs["position_ids"] = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 6])[: packed.loss_mask.shape[1]].expand(
        2, -1
    )
    with pytest.raises(UserError, match=r"data\.pack: true; accepted with own text"):
        call(own(), packed, gpt())
    with pytest.raises(UserError, match="no sequences; accepted: batch_transform=none"):
        call(own(), Batch(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)), gpt())
    for nobody in (None, SimpleNamespace()):
        with pytest.raises(UserError, match="no network teaches; accepted: student, or a live teacher"):
            call(own(writer="teacher"), Sequences().batch([0]), gpt(), nobody)
    unsaid = Sequences().batch([0, 1])
    unsaid.prompts = None
    with pytest.raises(UserError, match=r"how long its prompts are \(SequenceBatch\.prompts\); accepted"):
        call(own(), unsaid, gpt())
    running = Sequences(text=True).batch([0, 1])
    expected = texts(call(own(), running, gpt())[0])
    running.prompts = None
    assert texts(call(own(), running, gpt())[0]) == expected


def test_a_teacher_of_another_tokenizer_does_not_write():
    data, net = Sequences(), gpt(1)
    own_tokens, same, other = (SimpleNamespace(size=VOCAB, fingerprint=mark) for mark in ("a", "a", "b"))
    unlike = CrossTokenizerTeacher(net, TASK, other, own_tokens)
    for fraction in (0.0, 1.0):
        with pytest.raises(UserError, match=r"tokenizer is not the student's; accepted: .*kdlab generate") as caught:
            call(own(writer="teacher", fraction=fraction), data.batch([0]), gpt(), unlike)
        assert "\n" not in str(caught.value)
    call(own(), data.batch([0]), gpt(), unlike)  # the student writes
    expected = texts(call(own(writer="teacher"), data.batch(range(4)), gpt(), net)[0])
    alike = CrossTokenizerTeacher(net, TASK, same, own_tokens)
    assert texts(call(own(writer="teacher"), data.batch(range(4)), gpt(), alike)[0]) == expected
