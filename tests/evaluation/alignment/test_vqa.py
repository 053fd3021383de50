"""VQA models of every kind, tiny and random, against the networks' own outputs; and the ways they fail."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.questions import Question
from pixelgrow.evaluation.alignment.vqa import Vqa, load_vqa, spellings
from pixelgrow.pictures import to_pil
from question_models import ANSWERS, image_of, save_question_model
from text_models import save_clip

IMAGE = image_of(1)


def asked(text: str, answer: str = "yes") -> Question:
    return Question("1", text, answer, "entity")


class Case:
    """A saved model, its processor, and the same loaded by us."""

    def __init__(self, folder: Path, kind: str, **keywords: Any) -> None:
        self.model = save_question_model(folder, kind)
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.vqa: Any = load_vqa(str(folder), **keywords)

    def ids(self, *words: str) -> list[int]:
        return [self.processor.tokenizer.convert_tokens_to_ids(w) for w in words]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {kind: Case(tmp_path_factory.mktemp(kind), kind) for kind in ("vilt", "blip", "llava", "git")}


def begins(logits: Tensor, before: int, tokens: list[int]) -> float:
    """The probability that a text goes on with `tokens` after `before` tokens, from the logits (N, V) of the whole."""
    steps = logits[before - 1 : before - 1 + len(tokens)].log_softmax(-1)
    return float(steps.gather(1, torch.tensor(tokens)[:, None]).sum().exp())


# --- a list of answers ------------------------------------------------------------------------------------------------


def test_vilt_gives_the_logistic_of_its_logit(cases: dict[str, Case]) -> None:
    case, text = cases["vilt"], "is there a dog ?"
    inputs = case.processor(images=[to_pil(IMAGE)], text=[text], return_tensors="pt")
    with torch.no_grad():
        logits = case.model(**inputs).logits[0]
    for answer, labels in (
        ("Yes", ["yes"]),
        ("two", ["2", "two"]),
        ("2", ["2", "two"]),
        ("1", ["one"]),
        ("dog", ["dog"]),
    ):
        want = logits.sigmoid()[[ANSWERS.index(label) for label in labels]].max()
        assert case.vqa.probability(IMAGE, asked(text, answer)) == pytest.approx(float(want), rel=1e-5)
    assert case.vqa.answer(IMAGE, asked(text)) == ANSWERS[int(logits.argmax())]
    assert case.vqa.probability(image_of(2), asked(text)) != case.vqa.probability(IMAGE, asked(text))


def test_an_answer_outside_the_list_is_refused_before_it_is_asked(cases: dict[str, Case]) -> None:
    with pytest.raises(UserError, match=r"cannot answer 'four' and 1 more; expected answers among its 7"):
        cases["vilt"].vqa.check([asked("?", "yes"), asked("?", "four"), asked("?", "a cat"), asked("?", "four")])
    with pytest.raises(UserError, match="cannot answer 'four'"):
        cases["vilt"].vqa.probability(IMAGE, asked("?", "four"))


def test_a_question_longer_than_vilt_reads_is_told_once(
    cases: dict[str, Case], caplog: pytest.LogCaptureFixture
) -> None:
    long = asked("is there a dog in the image and are there many of the dogs ?")
    with caplog.at_level(logging.WARNING):
        for question in (
            long,
            long,
            asked("is there a dog in the image ?"),
        ):  # of 13 and of 9 words; it reads 10 tokens
            cases["vilt"].vqa.answer(IMAGE, question)
    assert [r.getMessage().endswith(f"reads 10 tokens and not all of {long.text!r}") for r in caplog.records] == [True]


# --- written answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["yes"], ["ele", "##ven"]])
def test_blip_gives_the_likelihood_of_the_answers_tokens(cases: dict[str, Case], words: list[str]) -> None:
    case, text = cases["blip"], "how many dogs are there ?"
    inputs = case.processor(images=[to_pil(IMAGE)], text=[text], return_tensors="pt")
    tokens = case.ids(*words)
    with torch.no_grad():
        seen = case.model.vision_model(inputs["pixel_values"]).last_hidden_state
        read = case.model.text_encoder(inputs["input_ids"], encoder_hidden_states=seen).last_hidden_state
        begun = torch.tensor([[case.model.decoder_start_token_id, *tokens]])
        logits = case.model.text_decoder(begun, encoder_hidden_states=read).logits[0]
    got = case.vqa.probability(IMAGE, asked(text, "".join(words).replace("#", "")))
    assert got == pytest.approx(begins(logits, 1, tokens), rel=1e-4)
    assert case.vqa.describe()["template"] == "{question}"


def llava_logits(case: Case, text: str, more: list[int]) -> tuple[Tensor, int]:
    """Logits of a chat that asks `text` and goes on with `more`, and the chat's length."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    chat = case.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = case.processor(images=[to_pil(IMAGE)], text=[chat], return_tensors="pt")
    whole = torch.cat([inputs["input_ids"], torch.tensor([more], dtype=torch.long)], 1)
    with torch.no_grad():
        logits = case.model(
            input_ids=whole, attention_mask=torch.ones_like(whole), pixel_values=inputs["pixel_values"]
        ).logits
    return logits[0], inputs["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        ("Yes", [["yes"], ["Yes"]]),
        ("three", [["three"], ["3"]]),
        ("3", [["three"], ["3"]]),
        ("eleven", [["ele", "##ven"]]),
    ],
)
def test_llava_is_asked_by_its_chat_template(cases: dict[str, Case], answer: str, written: list[list[str]]) -> None:
    case, text = cases["llava"], "how many dogs are there ?"
    want = 0.0
    for words in written:
        tokens = case.ids(*words)
        logits, before = llava_logits(case, text + " Answer in one word.", tokens)
        want += begins(logits, before, tokens)
    assert case.vqa.probability(IMAGE, asked(text, answer)) == pytest.approx(want, rel=1e-4)


def test_llavas_answer_is_the_most_probable_text(cases: dict[str, Case]) -> None:
    case, text, tokens = cases["llava"], "how many dogs are there ?", list[int]()
    while len(tokens) < 8 and 3 not in tokens:  # 3 ends a text
        logits, _ = llava_logits(case, text + " Answer in one word.", tokens)
        tokens.append(int(logits[-1].argmax()))
    want = case.processor.tokenizer.decode(tokens, skip_special_tokens=True)
    assert case.vqa.answer(IMAGE, asked(text)) == want.strip(" .,?").lower() != ""


@pytest.mark.parametrize(
    ("template", "prompt"), [("", "Question: is there a cat ? Answer:"), ("a {question}", "a is there a cat ?")]
)
def test_without_a_chat_template_it_is_asked_plainly(tmp_path: Path, template: str, prompt: str) -> None:
    case = Case(tmp_path, "git", template=template)
    inputs = case.processor(images=[to_pil(IMAGE)], text=[prompt], return_tensors="pt")
    with torch.no_grad():
        logits = case.model(**inputs).logits[0, -1]
    want = float(logits.softmax(-1)[case.ids("no", "No")].sum())
    assert case.vqa.probability(IMAGE, asked("is there a cat ?", "no")) == pytest.approx(want, rel=1e-4)
    about = case.vqa.describe()
    assert about["chat"] is False and about["class"] == "GitForCausalLM" and about["dtype"] == "torch.float32"
    assert about["template"] == (template or "Question: {question} Answer:")


@pytest.mark.parametrize("kind", ["blip", "llava", "git"])
def test_probabilities_of_all_first_tokens_sum_to_one(cases: dict[str, Case], kind: str) -> None:
    case = cases[kind]
    case.vqa._tokens = lambda answer: [(i,) for i in range(len(case.processor.tokenizer))]
    try:
        assert case.vqa.probability(IMAGE, asked("?")) == pytest.approx(1, abs=1e-5)
    finally:
        case.vqa._tokens = case.vqa._tokens_of


def test_an_answer_that_another_begins_is_counted_once(cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    vqa = cases["llava"].vqa
    monkeypatch.setattr(
        "pixelgrow.evaluation.alignment.vqa.spellings", lambda answer: ["ele", "eleven", "Yes no", "Yes"]
    )
    assert vqa._tokens_of("any") == sorted([tuple(cases["llava"].ids(w)) for w in ("ele", "Yes")])


def test_an_answer_without_tokens_is_refused(cases: dict[str, Case]) -> None:
    with pytest.raises(UserError, match="cannot answer 'zebra': its tokenizer has no token for it"):
        cases["llava"].vqa.check([asked("?", "yes"), asked("?", "zebra")])


def test_spellings() -> None:
    assert spellings("Yes") == ["yes", " yes", "Yes", " Yes"]
    assert spellings("3") == spellings("three") == ["three", " three", "Three", " Three", "3", " 3"]
    assert spellings("12") == ["12", " 12"] and spellings("one dog")[0] == "one dog"


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_weights_and_settings(tmp_path: Path, cases: dict[str, Case]) -> None:
    def fingerprint() -> str:
        return str(load_vqa(str(tmp_path)).describe()["fingerprint"])

    save_question_model(tmp_path, "git")
    first = fingerprint()
    assert first == cases["git"].vqa.describe()["fingerprint"]
    settings = tmp_path / "processor_config.json"
    settings.write_text(settings.read_text(encoding="utf-8").replace("0.5", "0.4"), encoding="utf-8")
    assert fingerprint() != first


@pytest.mark.parametrize(
    ("kind", "files", "words"),
    [
        ("git", {"config.json": '{"model_type": "git"}'}, "is a model whose config.json names no architecture"),
        ("git", {"config.json": '{"architectures": ["GitModel"]}'}, "is a GitModel, expected one that answers"),
        ("git", {"config.json": "{"}, "config.json cannot be read (JSONDecodeError)"),
        ("git", {"model.safetensors": None}, "no model.safetensors in"),
        ("git", {"model.safetensors": "cut"}, "model.safetensors is cut off"),
        ("vilt", {"processor_config.json": None, "tokenizer.json": None, "tokenizer_config.json": None}, "vilt"),
    ],
)  # fmt: skip
def test_a_damaged_model_is_one_line(tmp_path: Path, kind: str, files: dict[str, str | None], words: str) -> None:
    folder = tmp_path / kind
    save_question_model(folder, kind)
    for name, text in files.items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_vqa(str(folder))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_names_of_no_vqa_model_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="VQA model 'nobody/has-this' is not on this machine and cannot be fetched"):
        load_vqa("nobody/has-this")
    save_clip(tmp_path, whole=True)
    with pytest.raises(UserError, match="is a CLIPModel, expected one that answers questions about images"):
        load_vqa(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "template", "words"),
    [("git", "answer en", "expected {question} in it"), ("vilt", "a {question}", "expected no template")],
)
def test_templates_that_do_not_fit_are_one_line(tmp_path: Path, kind: str, template: str, words: str) -> None:
    save_question_model(tmp_path, kind)
    with pytest.raises(UserError, match="got template") as error:
        load_vqa(str(tmp_path), template=template)
    assert words in str(error.value)


def test_descriptions_are_json(cases: dict[str, Case]) -> None:
    for case in cases.values():
        vqa: Vqa = case.vqa
        assert json.loads(json.dumps(vqa.describe())) == vqa.describe()
