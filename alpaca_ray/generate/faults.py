"""Faults that users of Alpaca's data found in it (AlpacaDataCleaned), each a predicate over a candidate.

They judge by form and are charitable: a good row lost is a defect, as a bad one kept is. What the forms are is written
down in the tests, both ways.
"""

import re

from alpaca_ray.generate.parse import Candidate

# An output that says that there is none, or holds its place.
_NO_OUTPUT = re.compile(
    r"""[<(\["'*]* (?: no[ _-]?(?:output|answer|input) | n/?a | not[ ]applicable | none | output | response | answer
    | tbd | todo | (?:your|insert|enter|write)[ ](?:[a-z]+[ ]){0,3}(?:output|answer|response|text|here) ) [>)\]"'*]*
    [.:]? | [-\u2013\u2014] | \.{3} | \u2026""",
    re.VERBOSE | re.IGNORECASE,
)
# C0 and C1 without tab and line ends, the replacement character, a byte order mark, bidirectional overrides, and what
# has no width inside a Latin word (joiners are letters' business in other scripts, and in emoji).
_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ufeff\u202a-\u202e\u2066-\u2069]|\r(?!\n)"
    r"|(?<=[A-Za-z])[\u200b-\u200d\u2060](?=[A-Za-z])"
)
# Another task's heading, Alpaca's own prompt, or a separator.
_HEADING_INSIDE = re.compile(
    r"""^[^\w\n]{0,8}\d{1,3}[ ]?[.)][^\w\n]{0,8}(?:instruction|input|output)[^\w\n]{0,4}:
    | ^[^\w\n]{0,8}instruction[^\w\n]{0,4}: | ^[ \t]*\#{3,}[ \t]*$ | \#{3}[ ]?(?:response|input)[ ]?:
    | (?-i:\b\d{1,3}\.[ ](?:Instruction|Input|Output):)""",
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)

# Not in quotes: there it is a value of code, which nobody takes for a source.
_URL = re.compile(r"(?<![\"'])(?:https?://|www\.)[^\s<>()\"'`\]]+", re.IGNORECASE)
# Reserved for examples (RFC 2606), the machine itself, and names of XML vocabularies, which nobody visits.
_HARMLESS_URL = re.compile(
    r"(?:https?://)?(?:[\w-]+\.)*(?:example(?:\.\w+)?|localhost|127\.0\.0\.1|(?:\w+\.)?w3\.org|schema\.org|[\w-]+\.test)"
    r"(?:[:/?#].*)?",
    re.IGNORECASE,
)
_MARKDOWN_IMAGE = re.compile(r"!\[[^\]]*\]\((?P<target>[^)]*)\)")

# An asking verb at the start, then within a few words what can only be code. "Write a description of a function" is
# none: no preposition may come between.
_LANGUAGE = r"(?:python|javascript|typescript|java|c\+\+|c\#|sql|bash|html|css|ruby|php|kotlin|rust|perl|haskell|scala)"
_ASKS_FOR_CODE = re.compile(
    rf"""^(?:please[ ])?(?:write|create|implement|develop|code|generate|build|construct|compose)[ ](?:me[ ])?
    (?:(?!of\b|for\b|about\b|to\b|that\b|on\b|in\b|describing\b|explaining\b|comment|test|doc)[\w+#-]+[ ]){{0,4}}?
    (?:{_LANGUAGE}[ ](?:\w+[ ])?(?:code|function|program|script|query|class|method|snippet|statement)
    | function[ ](?:that|to|which|in[ ]{_LANGUAGE}) | sql[ ]query | regular[ ]expression | regex | code[ ]snippet
    | (?:bash|shell)[ ]script | (?:script|program|class|code|query)[ ]in[ ]{_LANGUAGE} )\b""",
    re.VERBOSE | re.IGNORECASE,
)
_CODE = re.compile(r"[={}`\\^$|*+]|;\s*$|</|\w\(|^\s{2,}\w|\b(?:SELECT|def|return|function)\b|\[[^\]]+\]", re.MULTILINE)

# What stands somewhere else: "the following text" with no colon, quotation, line or number that brings it along.
_TEXT_NOUN = (
    r"(?:texts?|sentences?|paragraphs?|passages?|articles?|excerpts?|poems?|emails?|essays?|reviews?|dialogues?|"
    r"conversations?|lists?|words?|numbers?|statements?|quotes?|tweets?|equations?|expressions?|phrases?|stor(?:y|ies)|"
    r"recipes?|code|table|data|documents?|headlines?|questions?|input)"
)
_REFERS = re.compile(
    rf"""\b(?: the[ ]following[ ](?:\w+[ ]){{0,2}}{_TEXT_NOUN} | (?:which|any|each|all|one)[ ]of[ ]the[ ]following
    | (?:the|this)[ ]{_TEXT_NOUN}[ ]below | the[ ](?:provided|below|above|given)[ ](?:\w+[ ])?{_TEXT_NOUN}
    )\b(?![ ](?:type|structure|set|point)s?\b)""",
    re.VERBOSE | re.IGNORECASE,
)
_CARRIES = re.compile(r"[:\"\u201c\u201d\u00ab`\n(=\d\u2013\u2014]|(?<!\w)['\u2018]\w")
# Code works on values that come later, and templates on words of the reader.
_SPEAKS_OF_CODE = re.compile(
    rf"\b(?:{_LANGUAGE}|code|function|program|script|query|algorithm|method|regex|formula|class|template)\b",
    re.IGNORECASE,
)
_PLACEHOLDER_INPUT = re.compile(
    r"""[\[<({]+\s* (?: (?:insert|paste|enter|add|put|provide|your|some)[ ](?:[\w']+[ ]){0,4}?
    (?:text|sentence|paragraph|passage|article|essay|story|code|content|data|list|link|url|input|here)
    | (?:input|article|sentence|paragraph|passage|text|essay)(?:[ ]here)? ) \s*[\]>)}]+""",
    re.VERBOSE | re.IGNORECASE,
)

_REFUSAL = re.compile(
    r"""\A\W*(?:
    [^.!?\n]{0,40}\bas[ ]an?[ ](?:ai|artificial[ ]intelligence|(?:large[ ])?language[ ]model)\b
    | (?:i(?:['\u2019]m|[ ]am)[ ](?:so[ ]|very[ ])?sorry|sorry|unfortunately|i[ ]apologi[sz]e)\b[^.!?\n]{0,30}?
      \b(?:i|we)[ ](?:can(?:['\u2019]t|not|[ ]not)|am[ ](?:un|not[ ])able[ ]to|do[ ]not|don['\u2019]t)[ ](?:assist|help|
      fulfill?|complete|comply|answer|generate|create|process|access|perform|open|view|see|browse|have|understand|provide)\b
    | i(?:['\u2019]m[ ]|[ ]am[ ])(?:just[ ])?an?[ ](?:ai|language[ ]model)\b
    | i[ ](?:can(?:['\u2019]t|not)|am[ ](?:un|not[ ])able[ ]to)[ ]
      (?:assist|fulfill?|comply|browse|access|process|open|view)\b
    | i[ ](?:do[ ]not|don['\u2019]t)[ ]have[ ](?:access[ ]to|the[ ]ability|personal|real-time|feelings|opinions)
    | (?:please[ ]provide|could[ ]you[ ](?:please[ ])?provide|no)[ ](?:me[ ]with[ ])?(?:an?[ ]|the[ ]|your[ ]|more[ ])?
      (?:input|text|sentence|article|passage|paragraph|context|details|information)\b[^\n]{0,80}\Z )""",
    re.VERBOSE | re.IGNORECASE,
)
# In these an apology or a request is the answer, or someone speaks as a machine.
_ASKS_FOR_SUCH_WORDS = re.compile(
    r"\b(?:e-?mails?|messages?|letters?|repl(?:y|ies)|respon[ds]\w*|refus\w*|declin\w*|apolog\w*|dialog\w*|conversation|"
    r"chat\w*|assistant|ai|robot|customer|character|role|speech|rewrite|rephrase|translate|sentence)\b",
    re.IGNORECASE,
)
_MIN_REPEATED_WORDS = 4  # fewer may well be right: "Name the largest number." with one number as input


def has_no_output(candidate: Candidate) -> bool:
    return _NO_OUTPUT.fullmatch(candidate.output.strip()) is not None


def has_control_characters(candidate: Candidate) -> bool:
    return _CONTROL.search(whole_text(candidate)) is not None


def has_merged_tasks(candidate: Candidate) -> bool:
    fields = (candidate.instruction, candidate.input, candidate.output)
    return any(_HEADING_INSIDE.search(field) for field in fields)


def has_hallucinated_url(candidate: Candidate) -> bool:
    given = f"{candidate.instruction}\n{candidate.input}".lower()
    urls = [url.rstrip(".,;:!?*_/").lower() for url in _URL.findall(candidate.output)]
    invented = [url for url in urls if not _HARMLESS_URL.fullmatch(url) and url.split("://")[-1] not in given]
    images = [found["target"].lower() for found in _MARKDOWN_IMAGE.finditer(candidate.output)]
    return bool(invented) or any(target not in given for target in images)


def lacks_code(candidate: Candidate) -> bool:
    return _ASKS_FOR_CODE.search(candidate.instruction) is not None and not _CODE.search(candidate.output)


def has_inconsistent_input(candidate: Candidate) -> bool:
    if candidate.input:
        return _PLACEHOLDER_INPUT.fullmatch(candidate.input.strip().rstrip(".")) is not None
    refers = _REFERS.search(candidate.instruction)
    return (
        refers is not None
        and not _CARRIES.search(candidate.instruction)
        and not _SPEAKS_OF_CODE.search(candidate.instruction)
    )


def refuses(candidate: Candidate) -> bool:
    return _REFUSAL.search(candidate.output) is not None and not _ASKS_FOR_SUCH_WORDS.search(candidate.instruction)


def repeats_the_task(candidate: Candidate) -> bool:
    if candidate.output == candidate.instruction:
        return True
    return candidate.output == candidate.input and len(candidate.input.split()) >= _MIN_REPEATED_WORDS


def whole_text(candidate: Candidate) -> str:
    return f"{candidate.instruction}\n{candidate.input}\n{candidate.output}"
