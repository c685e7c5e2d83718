"""Tokens that do not fit the model end in one line that says what to do, and labels stay with their tokens."""

import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

import stagewise as sw
from stagewise.evaluate import at
from stagewise.groups import query_groups, train_groups
from stagewise.run.before import look
from stagewise.run.exemplars import check_texts
from stagewise.run.preflight import miniature
from stagewise.tokens import check_classes

WORDS, CONTEXT = 20, 8


def neox():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=WORDS, max_position_embeddings=CONTEXT, **sizes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def gpt2():
    torch.manual_seed(0)
    fixed = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=8, n_layer=1, n_head=2, n_positions=CONTEXT, **fixed)
    ).eval()


def tokens(samples=12, length=CONTEXT):
    return torch.randint(1, WORDS, (samples, length), generator=torch.Generator().manual_seed(0))


def padded(side, width=0):
    """A collate that pads with zeros on one side, to the longest or to a width."""

    def collate(rows):
        longest = max(width, *map(len, rows))
        ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
        for k, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
            ids[k, place], mask[k, place] = torch.as_tensor(row, dtype=torch.long), 1
        return {"input_ids": ids, "attention_mask": mask}

    return collate


def ragged(lengths=(5, 5, 5, 3, 5, 5, 7, 5, 5, 5, 5, 5)):  # the few that are looked at closely are 5
    return [row[:length] for row, length in zip(tokens(len(lengths)), lengths, strict=True)]


def task(model, train, query=None, loss=sw.losses.causal_lm, **settings):
    return sw.Task(model, loss, train=train, queries={"val": train if query is None else query}, **settings)


def checked(*args, **settings):
    this = task(*args, **settings)
    return at(this, sw.Checkpoint(0, this.state(), sw.Optimizer("sgd", 0.1, batch_size=4)))


class Anywhere:
    """A posterior wherever the task can be evaluated."""

    window = None
    at = staticmethod(at)


def looked(this):
    run = sw.Trajectory.from_checkpoints([sw.Checkpoint(0, this.state(), sw.Optimizer("sgd", 0.1, batch_size=0))])
    return look(this, run, Anywhere(), [0])


def refused(said, *args, **settings):
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        checked(*args, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [neox, gpt2])
def test_a_context_longer_than_the_models_is_refused_and_not_extrapolated(model):
    checked(model(), tokens())
    said = "has 9 tokens, but the model was made for contexts of 8 (model.config.max_position_embeddings); cut the"
    refused(f"train: sample 0 {said}", model(), tokens(length=9))
    one_longer = [*tokens(8, 5), *tokens(1, 9), *tokens(3, 5)]
    refused(f"queries['val']: sample 8 {said}", model(), ragged(), one_longer, collate=padded("right"))


def test_a_sequence_with_its_last_target_is_no_longer_than_the_context_it_gives_the_model():
    def next_token(model, batch):
        logits = model(input_ids=batch[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")

    checked(neox(), tokens(length=CONTEXT + 1), loss=next_token)
    refused("has 10 tokens, but the model was made for contexts of 8", neox(), tokens(length=10), loss=next_token)


def test_a_run_that_was_trained_on_longer_contexts_says_so():
    model = neox()
    model.config.max_position_embeddings = 9
    checked(model, tokens(length=9))


@pytest.mark.parametrize("model", [neox, gpt2])
@pytest.mark.parametrize("number", [WORDS, 50_000, -1])
def test_tokens_of_another_tokenizer_are_refused_in_any_sample_of_any_set(model, number):
    other = tokens()
    other[5, 3] = number  # not among the few that are looked at closely
    said = f"sample 5 has the token {number}, but the model knows tokens from 0 to 19; use the model's own tokenizer"
    refused(f"train: {said}", model(), other)
    refused(f"queries['val']: {said}", model(), {"input_ids": tokens()}, {"input_ids": other})
    refused(f"train: {said}", model(), list(other), collate=padded("right"))


def test_labels_the_model_does_not_know_are_refused_but_ignored_ones_are_none():
    labels = tokens()
    labels[:, :3] = -100
    checked(neox(), {"input_ids": tokens(), "labels": labels})
    labels[6, 4] = WORDS
    refused("sample 6 has the label 20, but", neox(), {"input_ids": tokens(), "labels": labels})


def test_an_index_out_of_range_in_a_model_of_ones_own_is_told_with_its_data():
    model = torch.nn.Sequential(torch.nn.Embedding(WORDS, 4), torch.nn.Linear(4, WORDS))
    other = tokens()
    other[5, 3] = WORDS
    refused("train: in samples 4 to 7 the loss cannot be evaluated: IndexError", model, other, forward_batch=4)


@pytest.mark.parametrize("length", [0, 1])
def test_sequences_too_short_for_a_loss_are_refused_by_their_number(length):
    refused(f"train: sample 0 is of length {length}, too short for a loss", neox(), tokens(length=length))
    rows = ragged()
    rows[6] = rows[6][:length]
    refused(f"train: sample 6 is of length {length}, too short for a loss", neox(), rows, collate=padded("right"))
    with pytest.raises(ValueError, match="causal_lm: expected sequences of two tokens or more"):
        sw.losses.causal_lm(neox(), tokens(length=1))


def test_a_single_token_is_enough_for_losses_of_ones_own():
    checked(neox(), tokens(length=1), loss=lambda model, batch: model(batch).logits.square().mean((1, 2)))


def test_ragged_rows_are_told_of_padding():
    rows = [row.tolist() for row in ragged()]
    refused("12 samples cannot be made into one batch", neox(), [rows[k] for k in range(12)])
    refused("causal_lm: expected a tensor of tokens", neox(), tokens(4, 5).tolist())


@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_that_move_beside_longer_samples_are_refused(side):
    settings = {"collate": padded(side), "train_groups": [["a"] * (len(row) - 1) for row in ragged()]}
    if side == "right":
        checked(neox(), ragged(), **settings)
        return
    refused(
        "train: beside a longer sample, the tokens of sample 3 have their losses in other places",
        neox(),
        ragged(),
        **settings,
    )


def test_padding_on_the_left_to_one_length_moves_nothing():
    checked(neox(), ragged(), collate=padded("left", width=CONTEXT))


def test_padding_that_counts_in_the_loss_is_refused():
    def own(model, batch):
        return sw.losses.causal_lm(model, batch)[0]

    with pytest.raises(ValueError, match="sample 3 has 2 losses alone and 6 beside a longer one; return a pair"):
        checked(neox(), ragged(), loss=own, collate=padded("right"))


def test_losses_of_whole_samples_may_be_padded_anywhere():
    def whole(model, batch):
        values, weights = sw.losses.causal_lm(model, batch)
        return (values * weights).sum(1)

    checked(neox(), ragged(), loss=whole, collate=padded("left"))


def test_a_class_of_tokens_of_which_none_counts_is_refused_before_the_work():
    mask = torch.ones(12, CONTEXT, dtype=torch.long)
    mask[:, 5:] = 0
    data = {"input_ids": tokens(), "attention_mask": mask}
    names = [["early"] * 4 + ["late"] * 3] * 12
    with pytest.raises(ValueError, match=r"train_groups: no token with the label 'late' counts .* give these tokens"):
        looked(task(neox(), data, train_groups=names))
    with pytest.raises(ValueError, match=r"query_groups\['val'\]: no token with the label 'late' counts"):
        check_classes(task(neox(), data, query_groups={"val": names}))
    mask[11, 5] = 1  # one is enough, wherever it is
    check_classes(task(neox(), data, train_groups=names, query_groups={"val": names}, forward_batch=5))
    with pytest.raises(ValueError, match="'late' counts"):
        check_classes(task(neox(), data, train_groups=names, candidates=range(11)))


def test_no_labels_at_all_are_refused_by_their_data():
    this = task(neox(), tokens(), train_groups=[None] * 12, query_groups={"val": [[None] * 7] * 12})
    for groups, name in ((train_groups, "train"), (query_groups, "val")):
        with pytest.raises(ValueError, match=f"^{name}: no sample or token has a label"):
            groups(this)


def test_texts_of_every_sample_are_counted_and_not_those_of_the_longest_alone():
    rows = ragged()
    texts = [[str(int(token)) for token in row[1:]] for row in rows]
    settings = {"collate": padded("right"), "forward_batch": 4}
    check_texts(task(neox(), rows, train_texts=texts, **settings))
    for row in (3, 4):  # as the texts of the first token too, in one sample
        shifted = [[str(int(rows[row][0])), *each] if k == row else each for k, each in enumerate(texts)]
        length = len(rows[row])
        with pytest.raises(
            ValueError, match=f"{length} texts of sample {row}, but the loss returns {length - 1} losses"
        ):
            check_texts(task(neox(), rows, train_texts=shifted, **settings))


def test_a_trial_with_a_few_samples_has_losses_for_the_labels_of_the_longest():
    rows = ragged((5,) * 12 + (7,) + (5,) * 11)
    labels = [["a"] * (len(row) - 1) for row in rows]
    labels[12][-1] = None  # the last token of the longest is of no class
    settings = {"train_groups": labels, "query_groups": {"val": labels}, "candidates": [0, 5, 9]}
    whole = task(neox(), rows, collate=padded("right"), **settings)
    for this in (whole, miniature(whole)):
        assert train_groups(this).tokens == 6
        assert query_groups(this).widths == {"val": 6}
