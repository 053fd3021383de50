"""Question files of the published forms, read and refused; numbers and nouns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.nouns import number, plural, singular
from pixelgrow.evaluation.alignment.questions import Question, load_questions

DSG = '''\
item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language
tea_5,"A cup, two spoons","cup",1,0,entity,whole,entity - whole (cup),Is there a cup?
tea_5,"A cup, two spoons",spoons,2,0,entity,whole,entity - whole (spoons),Are there spoons?
tea_5,"A cup, two spoons","spoons, ==2",3,2,other,count,"other - count (spoons, ==2)",Are there two spoons?
tea_5,"A cup, two spoons","cup, spoons",4,"1, 2,4",relation,spatial,"relation - spatial (...)",Are they near?
sky_1,"a sign that says ""hi""",sign,1,0,entity,whole,entity - whole (sign),"Does a sign say ""hi""?"
'''
GENEVAL2 = [
    {
        "prompt": "two red kites",
        "atom_count": 3,
        "vqa_list": [["How many kites are in the image?", "two"], ["Are the kites red?", "Yes"]],
        "skills": ["count", "attribute"],
    },
    {"prompt": "a kite", "atom_count": 1, "vqa_list": [["Are there any kites?\u2028", "Yes"]], "skills": ["object"]},
]
GECKO = """\
,dataset_id,prompt,prompt_type,prompt_id,max_disagreement_less_0.3
0,att/color:composed,two red kites,Gecko(S),7,True
1,att/count:simple_numeric,four kites.,Gecko(S),8,True
2,att/count:additive_3,"one bus, 2 cookies and five leaves.",Gecko(S),9,True
3,att/count:simple_numeric,6 kites.,Gecko(S),10,True
4,att/count:quant_and_neg,some kites and some pies. There are more kites than pies.,Gecko(S),11,True
5,att/count:additive_3,"2 kites, 4 pies and 2 kites.",Gecko(S),12,True
"""
GECKONUM = """\
index,prompt,has_numeral,is_frequent,entities,prompt_type,dataset_id
0,3 kites.,0,1,kite:3,numeric_simple,geckonum_00000
1,There are two red kites above one fly.,1,-1,"red kite:2,fly:1",attribute-spatial,geckonum_00001
2,Six kites.,1,1,kite:6,numeric_simple,geckonum_00002
3,There are only a few kites.,0,-1,"kite:few,sky:1",approx-1-entity,geckonum_00003
4,"There is 1 kite, broken into two pieces.",1,-1,kite:1,part-whole,geckonum_00004
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "questions"
    path.write_text(text, encoding="utf-8")
    return path


def test_dsg(tmp_path: Path) -> None:
    tea, sky = load_questions(written(tmp_path, "\ufeff" + DSG), "dsg")
    assert tea.prompt == "A cup, two spoons" and tea.id == "tea_5"
    assert tea.questions[2] == Question("3", "Are there two spoons?", "yes", "other", ("2",))
    assert [q.parents for q in tea.questions] == [(), (), ("2",), ("1", "2")]  # of itself, nothing
    assert sky.prompt == 'a sign that says "hi"' and sky.questions[0].text == 'Does a sign say "hi"?'


def test_rows_of_an_item_need_not_be_together(tmp_path: Path) -> None:
    lines = DSG.splitlines()
    mixed = load_questions(written(tmp_path, "\n".join([lines[0], lines[4], lines[5], *lines[1:4]])), "dsg")
    assert [len(item.questions) for item in mixed] == [4, 1]


def test_geneval2(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in GENEVAL2) + "\n\n"
    two, one = load_questions(written(tmp_path, lines), "geneval2")
    assert two.prompt == "two red kites" and two.id == "0" and one.id == "1"
    assert two.questions == (
        Question("1", "How many kites are in the image?", "two", "count"),
        Question("2", "Are the kites red?", "Yes", "attribute"),
    )


def test_gecko_counts_up_to_five(tmp_path: Path) -> None:
    items = load_questions(written(tmp_path, GECKO), "gecko")
    assert [item.id for item in items] == ["8", "9", "12"]
    assert items[0].questions == (
        Question("1", "How many kites are in the image?", "4", "simple_numeric", (), "kite"),
    )  # fmt: skip
    assert [(q.noun, q.answer) for q in items[1].questions] == [("bus", "1"), ("cookie", "2"), ("leaf", "5")]
    assert items[1].questions[0].text == "How many buses are in the image?"
    assert [(q.noun, q.answer) for q in items[2].questions] == [("kite", "4"), ("pie", "4")]


def test_geckonum_counts_exact_numbers_up_to_five(tmp_path: Path) -> None:
    items = load_questions(written(tmp_path, GECKONUM), "gecko")
    assert [item.id for item in items] == ["geckonum_00000", "geckonum_00001"]
    assert [(q.text, q.answer, q.noun) for q in items[1].questions] == [
        ("How many red kites are in the image?", "2", "red kite"),
        ("How many flies are in the image?", "1", "fly"),
    ]


@pytest.mark.parametrize(
    ("form", "text", "words"),
    [
        ("dsg", "", "got an empty file; expected item_id, text"),
        ("dsg", DSG.partition("\n")[0], "got no questions"),
        ("dsg", DSG.replace("proposition_id", "id"), "no column proposition_id; got item_id, text, keywords, id"),
        ("dsg", DSG.replace("spoons,2,0", "spoons,2,9"), "line 3: question 2 of 'tea_5' depends on 9, which is no"),
        ("dsg", DSG.replace("spoons,2,0", "spoons,2,4"), "questions 2 -> 4 -> 2 of 'tea_5' depend on each other"),
        ("dsg", DSG.replace("spoons,2,0", "spoons,1,0"), "line 3: proposition_id 1 of 'tea_5' is there already"),
        ("dsg", DSG.replace("Is there a cup?", ""), "line 2: nothing in column question_natural_language"),
        ("dsg", DSG.replace("sky_1", "tea_5"), "line 6: item_id 'tea_5' has another text than above"),
        ("dsg", DSG + '"tea_5', "after line 6: not CSV"),
        ("geneval2", "", "got no questions"),
        ("geneval2", DSG, "line 1: not JSON"),
        ("geneval2", "[" * 5000, "line 1: not JSON"),
        ("geneval2", "[1]", "line 1: no prompt or no vqa_list"),
        ("geneval2", json.dumps(GENEVAL2[0] | {"vqa_list": []}), "line 1: no prompt or no vqa_list"),
        ("geneval2", json.dumps(GENEVAL2[0] | {"skills": ["count"]}), "skills do not match the 2 questions"),
        ("geneval2", json.dumps(GENEVAL2[1] | {"vqa_list": [["a?"]]}), 'vqa_list holds ["a?"]; expected [question'),
        ("gecko", GECKO.replace("dataset_id", "data"), "no column dataset_id"),
        ("gecko", "\n".join(GECKO.splitlines()[:2]), "got no questions"),
        ("gecko", GECKONUM.replace("kite:3", "kite:three"), "line 2: entities 'kite:three'; expected noun:number"),
        ("tifa", DSG, "got form 'tifa', expected one of dsg, geneval2, gecko"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(tmp_path: Path, form: str, text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load_questions(written(tmp_path, text), form)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert form == "tifa" or str(tmp_path) in str(error.value)


def test_files_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"item_id\xff")
    with pytest.raises(UserError, match="byte 7 is not UTF-8"):
        load_questions(tmp_path / "bytes", "dsg")
    with pytest.raises(UserError, match=r"cannot read .*absent: No such file"):
        load_questions(tmp_path / "absent", "dsg")


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("dog", "dogs"), ("fly", "flies"), ("cookie", "cookies"), ("toy", "toys"), ("fish", "fish"), ("leaf", "leaves"),
        ("sandwich", "sandwiches"), ("couch", "couches"), ("box", "boxes"), ("dress", "dresses"), ("horse", "horses"),
        ("ukulele", "ukuleles"), ("cinnamon stick", "cinnamon sticks"), ("black fly", "black flies"), ("bus", "buses"),
    ],
)  # fmt: skip
def test_nouns(one: str, many: str) -> None:
    assert plural(one) == many and singular(many) == one


def test_numbers() -> None:
    answers = {"3": 3, "Three dogs": 3, "there are 12.": 12, "none": 0, "no dogs": None, "someone": None, "": None}
    assert {text: number(text) for text in answers} == answers
