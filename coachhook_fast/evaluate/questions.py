"""The edited fact as a question: the record's own where it has one, else its relation's."""

from __future__ import annotations

from coachhook_fast.evaluate.record import EditRecord

# By Wikidata's relation ids, as CounterFact and KnowEdit name them.
QUESTIONS = {
    "P17": "Which country is {} in?",
    "P19": "Where was {} born?",
    "P20": "In which city did {} die?",
    "P22": "Who is the father of {}?",
    "P25": "Who is the mother of {}?",
    "P26": "Who is the spouse of {}?",
    "P27": "Which country is {} a citizen of?",
    "P30": "On which continent is {}?",
    "P36": "What is the capital of {}?",
    "P37": "What is the official language of {}?",
    "P39": "What position does {} hold?",
    "P40": "Who is the child of {}?",
    "P54": "Which team does {} play for?",
    "P58": "Who is the screenwriter of {}?",
    "P86": "Who is the composer of {}?",
    "P101": "What field does {} work in?",
    "P103": "What is the native language of {}?",
    "P106": "What is the occupation of {}?",
    "P108": "Who is the employer of {}?",
    "P118": "Which league does {} play in?",
    "P119": "Where is {} buried?",
    "P127": "Who is the owner of {}?",
    "P131": "Where is {} located?",
    "P136": "What genre of music does {} play?",
    "P138": "What is {} named after?",
    "P140": "What is the religion of {}?",
    "P159": "In which city are the headquarters of {}?",
    "P161": "Who is a cast member of {}?",
    "P166": "Which award did {} win?",
    "P172": "Which ethnic group does {} belong to?",
    "P176": "Who produces {}?",
    "P178": "Who developed {}?",
    "P190": "What is the twin city of {}?",
    "P264": "Which record label does {} belong to?",
    "P276": "Where is {} located?",
    "P364": "What is the original language of {}?",
    "P407": "In which language was {} written?",
    "P413": "Which position does {} play?",
    "P449": "On which network did {} first air?",
    "P463": "Which organization is {} a member of?",
    "P495": "In which country was {} created?",
    "P641": "Which sport does {} play?",
    "P740": "Where was {} founded?",
    "P937": "In which city did {} work?",
    "P1303": "Which instrument does {} play?",
    "P1412": "Which language does {} speak?",
    "P3373": "Who is a sibling of {}?",
}


def question_of(record: EditRecord) -> str | None:
    """The edit prompt or a paraphrase that is a question, else the relation's question; None where there is none."""
    own = (text for text in (record.request.text, *record.paraphrases) if text.rstrip().endswith("?"))
    question = next(own, None)
    if question is None and record.relation in QUESTIONS:
        question = QUESTIONS[record.relation].replace("{}", record.request.subject)
    return question
