"""The filters, each at its boundary: what it rejects, and what looks like it and must pass."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_ray.config import UserError
from alpaca_ray.generate.filters import FILTERS, check_filter_names, reject_reason
from alpaca_ray.generate.parse import Candidate
from alpaca_ray.schema import as_examples, read_evaluation_tasks, read_seed_tasks

# generate_instruction.py of Stanford Alpaca: its block list, which it matches as whole words in any case
ALPACAS_BLOCK_LIST = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
    "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip


def reason(instruction: str, output: str = "Fine.", input: str = "") -> str | None:
    return reject_reason(Candidate(instruction, input, output))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("Name three long rivers", None),
        ("Name three rivers", "too_short"),
        ("  Name   three\n\n rivers ", "too_short"),
        ("Name", "too_short"),
        ("", "too_short"),
        (" ".join(["word"] * 150), None),
        (" ".join(["word"] * 151), "too_long"),
        ("Write a program that sorts words", "write_a_program"),
        ("Write a programme for the concert", "write_a_program"),
        ("Write a poem about a program", None),
        ("Please Write a program for me", None),
        ("'Tis the season: explain it", "starts_with_punctuation"),
        ("(Briefly) explain how rain forms", "starts_with_punctuation"),
        ("$5 are how many cents", "starts_with_punctuation"),
        ("5 dollars are how many cents", None),
        ("\u00c9crivez une phrase en fran\u00e7ais", "starts_with_non_ascii"),
        ("\u201cQuote\u201d something that is wise", "starts_with_non_ascii"),
        ("Explain the word \u201ccaf\u00e9\u201d briefly", None),
    ],
)
def test_an_instruction_and_its_reason(instruction: str, expected: str | None) -> None:
    assert reason(instruction) == expected


@pytest.mark.parametrize("word", ALPACAS_BLOCK_LIST)
def test_a_blocked_word_is_rejected_as_a_whole_word_in_any_case(word: str) -> None:
    for text in (word, word.upper(), word.title()):
        for sentence in (f"Explain how {text} works", f"Explain this thing: {text}.", f"Explain ({text}) to me"):
            assert reason(sentence) == "blocked_word", sentence
    for sentence in (f"Explain how {word}type works", f"Explain how un{word} works", f"Explain {word}_1 to me"):
        assert reason(sentence) is None, sentence


@pytest.mark.parametrize(
    "word", ["filetype", "profile", "graphical", "paragraph", "mapped", "drawing", "musical", "plots"]
)
def test_a_word_that_only_holds_a_blocked_one_passes(word: str) -> None:
    assert reason(f"Explain the word {word} briefly") is None


def test_only_the_instruction_is_searched_for_blocked_words() -> None:
    candidate = Candidate("Summarise the following short text", "A file of music.", "An image.")
    assert reject_reason(candidate) is None


def test_an_answer_must_not_be_empty() -> None:
    assert reason("Name three long rivers", output="") == "empty_output"
    assert reason("Name three long rivers", output=" \n") == "empty_output"
    assert reason("Name three long rivers", output="0") is None


def test_the_first_filter_that_applies_names_the_reason() -> None:
    worst = '"File '
    assert reason(worst, output="") == "empty_output"
    assert reason(worst) == "too_short"
    assert reason(worst + "word " * 151) == "too_long"
    assert reason(worst + "word " * 9) == "blocked_word"
    assert reason('"Explain ' + "word " * 9) == "starts_with_punctuation"
    assert list(FILTERS).index("write_a_program") > list(FILTERS).index("blocked_word")


ASK = "Answer the question as well as you can."

# (the filter, instruction, input, output) of candidates that it rejects
REJECTED = [
    *(("not_applicable_output", ASK, "", output) for output in (
        "N/A", "n/a.", "NA", "None", "<nooutput>", "nooutput", "No output", "<noinput>", "Not applicable", "Output:",
        "[output]",
        "...", "-", "[Your answer here]", "<insert response>", "TODO",
    )),
    *(("control_characters", ASK, "", output) for output in (
        "a\x00b", "a\x1b[0mb", "bell\x07", "a\x85b", "a\ufffdb", "\u202eabc", "\ufeffabc", "in\u200bvisible", "a\rb",
        "a\x0cb",
    )),
    *(("merged_tasks", ASK, "", output) for output in (
        "Yes.\n5. Instruction: Name a river.", "Yes.\n**6. Input:**\nx", "Yes.\n###\nMore", "Yes. 7. Output: no",
        "Yes.\n### Instruction:\nName it.", "Yes.\nInstruction: Name a river.", "Yes.\n### Response: no",
    )),
    ("merged_tasks", "Name a river. 5. Instruction: Name a lake.", "", "The Rhine."),
    ("merged_tasks", ASK, "x\n4. Output: y", "z"),
    *(("hallucinated_url", ASK, "", output) for output in (
        "See https://www.nasa.gov/mars for more.", "Visit www.acme.co!", "![A cat](https://cdn.acme.co/cat.png)",
        "![A cat](cat.png)", "[1] http://acme.co/example.com",
    )),
    ("hallucinated_url", "Shorten the address https://acme.co", "", "https://short.ly/x1"),
    *(("missing_code", instruction, "", "You loop over the words and give their number back.") for instruction in (
        "Write a Python function that counts words", "Create a function to count words in a text",
        "Write an SQL query for all customers in Rome", "Generate a regular expression for dates",
        "Write a short bash script",
        "Implement a class in Java for a stack", "Please write a JavaScript code snippet",
    )),
    *(("inconsistent_input", instruction, "", "Fine.") for instruction in (
        "Summarise the following paragraph in one sentence.", "Rewrite the given sentence in the past tense.",
        "Which of the following is a mammal?", "Translate the text below into French.",
        "Classify the provided short review.",
        "Find the longest word in the given list.", "Proofread the following short email.",
    )),
    *(("inconsistent_input", ASK, input, "Fine.") for input in (
        "[insert text]", "<your text here>", "[Insert a short paragraph here]", "{{paste the article}}", "<article>",
        "[Text here].",
    )),
    ("wrong_arithmetic", ASK, "", "So 12 * 7 = 85."),
    ("wrong_arithmetic", "What is 12 + 5 * 2?", "", "34"),
    *(("refusal", ASK, "", output) for output in (
        "As an AI language model, I have no opinion.", "I'm sorry, but as an AI I cannot do that.",
        "I'm sorry, but I can't assist with that request.", "Unfortunately, I am unable to access websites.",
        "I am an AI.",
        "I cannot browse the internet.", "I don't have access to real-time data.",
        "I don\u2019t have personal opinions.",
        "Please provide the text that I should summarise.", "No input provided.",
    )),
    ("repeats_instruction", "Name the tallest tower there is", "", "Name the tallest tower there is"),
    ("repeats_instruction", "Correct the spelling mistakes in it", "I like my old bike", "I like my old bike"),
    ("personal_data", ASK, "Mail me at jane.doe@contoso.com", "I will."),
    ("personal_data", "Call 212-736-5000 and say hello", "", "Hello."),
    ("personal_data", ASK, "", "His card is 4111 1111 1111 1111."),
    ("secret", ASK, "", "-----BEGIN RSA PRIVATE KEY-----"),
    ("secret", ASK, "api_key = '9f8c7b6a5d4e3f2a1b0c'", "Keep it safe."),
]  # fmt: skip

# (instruction, input, output) of candidates that look as if and are fine
KEPT = [
    # outputs
    *((ASK, "", output) for output in (
        "None of them.", "No", "0", "?", ">", "N", "-5", "Nothing", "null", "[]", "Output: 5", "The answer is none.",
        "No answer yet",
        "[Your Name], welcome!", "Dear [Name],",
    )),
    # characters
    *((ASK, "", output) for output in (
        "tab\tand\nline", "line\r\nline", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "caf\u00e9 \u4f60\u597d", "soft\u00adhyphen", "a\u00a0b",
    )),
    # headings
    *((ASK, "", output) for output in (
        "# Title\n## Part\n### Details\nText", "Instructions:\n1. Mix.\n2. Bake.", "Input: 3\nOutput: 4",
        "C# and F# ###",
        "It was in 2020. Output: high.", "5. Inputs and outputs", "1. Instruction manuals: read them.",
    )),
    # URLs
    (ASK, "See https://acme.co/a/b for it", "It is on https://acme.co/a/b."),
    (ASK, "Our site is www.acme.co", "Visit https://www.acme.co/."),
    (ASK, "", "Try https://example.com/login or http://shop.example.org."),
    (ASK, "", "http://localhost:8000/docs shows it."),
    (ASK, "", '<svg xmlns="http://www.w3.org/2000/svg"></svg>'),
    (ASK, "", 'requests.get("https://api.acme.co/v1")'),
    (ASK, "", "Amazon.com sells it. Use e.g. this, i.e. that."),
    (ASK, "logo.png", "![Logo](logo.png)"),
    (ASK, "", "[link](#part) and a[0](x)"),
    # code
    ("Write a Python function that doubles a number", "", "def double(x):\n    return 2 * x"),
    ("Write an SQL query for all customers", "", "SELECT * FROM customers;"),
    ("Generate a regular expression for digits", "", "\\d+"),
    ("Write a short bash script", "", "ls | wc -l"),
    ("Write a script for a short play", "", "ANNA: Good morning."),
    ("Write a description of a Python function", "", "It counts words."),
    ("Write a story about a function that dreams", "", "It dreamt of loops."),
    ("Create a class schedule for Monday", "", "Maths, then biology."),
    ("Write a query letter to a publisher", "", "Dear Sir or Madam"),
    ("Explain what a Python function is", "", "A named piece of work."),
    ("Write a comment for a Python function", "", "Counts the words of a text."),
    # input
    ("Summarise the following paragraph: The sea rose.", "", "It rose."),
    ('Rewrite the given sentence "I go" in the past tense.', "", "I went."),
    ("Sort the following numbers\n3, 1, 2", "", "1, 2, 3"),
    ("Sort the following words (pear, apple)", "", "apple, pear"),
    ("Summarise the following paragraph.", "The sea rose.", "It rose."),
    ("Write a function that reverses the given list.", "", "def f(x): return x[::-1]"),
    ("Explain what happens in the following days after a fast.", "", "Hunger comes."),
    ("Describe the following of a celebrity.", "", "Fans."),
    ("Name a given text type and explain it.", "", "An essay."),
    ("Fill in the letter with my name Ann.", "Dear [Insert Name], welcome [Your City].", "Dear Ann"),
    (ASK, "[1, 2, 3]", "6"),
    (ASK, "<p>text</p>", "text"),
    (ASK, "(a, b)", "a"),
    # arithmetic
    ("What is 12 + 5 * 2?", "", "12 + 5 * 2 = 12 + 10 = 22"),
    # refusals that were asked for, and apologies
    ("Write a polite email that declines an invitation", "", "I'm sorry, but I cannot open the event with you."),
    ("Write a reply to a customer who wants a refund", "", "Unfortunately, we cannot process refunds after a month."),
    ("Explain in one line what a chatbot says about itself", "", "I am an AI."),
    (ASK, "", "I cannot recommend this film enough."),
    (ASK, "", "Sorry is the hardest word."),
    (ASK, "", "Use it as an aid, not as an answer."),
    (ASK, "", "Please provide feedback to each other at the end of the meeting.\nThank you."),
    # repetition
    ("Name the largest of the numbers.", "7", "7"),
    ("Correct the spelling of the name.", "Jane Doe", "Jane Doe"),
    # privacy
    (ASK, "", "Write to jane@example.com or call (212) 555-0123."),
    ("Suggest a strong password for me", "", "Password: gT7!kLm2#xQ9"),
    (ASK, "", 'password = input("Password: ")'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "instruction", "input", "output"), REJECTED)
def test_a_fault_is_found_and_named(name: str, instruction: str, input: str, output: str) -> None:
    assert reason(instruction, output, input) == name
    assert reason(instruction, output, input) != reject_reason(Candidate(instruction, input, output), skip=[name])


@pytest.mark.parametrize(("instruction", "input", "output"), KEPT)
def test_a_good_candidate_passes(instruction: str, input: str, output: str) -> None:
    assert reason(instruction, output, input) is None


def test_every_filter_has_an_example() -> None:
    alpacas = list(FILTERS)[:7]
    assert {name for name, *_ in REJECTED} == set(FILTERS) - set(alpacas)


def test_no_task_of_the_package_is_rejected() -> None:
    examples = [*as_examples(read_seed_tasks(None)), *as_examples(read_evaluation_tasks(None))]
    found = {e.instruction: reason(e.instruction, e.output, e.input) for e in examples}
    assert {instruction: name for instruction, name in found.items() if name} == {}


def test_a_skipped_filter_rejects_nothing() -> None:
    candidate = Candidate("Draw a big picture of it", "", "N/A")
    assert reject_reason(candidate) == "blocked_word"
    assert reject_reason(candidate, skip=["blocked_word"]) == "not_applicable_output"
    assert reject_reason(candidate, skip=["blocked_word", "not_applicable_output"]) is None
    assert reject_reason(Candidate("", "", "x"), skip=["empty_output", "too_short"]) is None


def test_an_unknown_filter_is_an_error_that_names_the_nearest() -> None:
    check_filter_names([*FILTERS, "contaminated"])
    check_filter_names([])
    with pytest.raises(
        UserError, match=r"generate\.skip_filters: 'blocked_words' is no filter; did you mean 'blocked_word'"
    ):
        check_filter_names(["secret", "blocked_words"])


@settings(deadline=None, max_examples=100)
@given(st.builds(Candidate, st.text(), st.text(), st.text()))
def test_any_candidate_has_a_known_reason_or_none(candidate: Candidate) -> None:
    assert reject_reason(candidate) in {None, *FILTERS}
    for applies in FILTERS.values():
        assert isinstance(applies(candidate), bool)
