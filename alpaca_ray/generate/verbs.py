"""What an instruction asks for: its verb and the noun it acts on (self-instruct, Wang et al. 2023, figure 3).

A heuristic over word lists. The paper takes the root verb and its direct object from a parser whose model has to be
downloaded. A sentence without a subject needs no parser: the verb comes first, its object follows. Only the closed
classes of words are listed, for verbs and nouns cannot be.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

MAX_CHARACTERS = 500  # of an instruction; what it asks stands at its head

_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+|\n+")
_TOKEN = re.compile(r"[^\W\d_][\w'\u2019-]*|\d[\w.,-]*|[^\w\s]")
# Polite forms of an imperative: the verb follows.
_POLITE = re.compile(
    r"^(?:(?:can|could|would|will) you\b|i (?:want|need|would like|'d like) you to\b|your (?:task|job) is to\b"
    r"|you (?:should|must|will|need to|have to|are to|are asked to)\b|help me(?: to)?\b|let's\b|try to\b)\s*",
    re.IGNORECASE,
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PRONOUNS = _words(
    "i you he she it we they me him her us them myself yourself itself themselves someone everyone anyone something"
    " everything anything nothing"
)
_DETERMINERS = _words(
    "a an the this that these those my your his its our their each every all both some any no another either neither"
    " such several many few most other one two three four five six seven eight nine ten twelve twenty hundred"
)
_PREPOSITIONS = _words(
    "about above across after against along among around as at before behind below beneath beside between beyond by"
    " despite during except for from in inside into like near of on onto outside over per regarding since than through"
    " throughout to toward towards under unlike until upon versus via with within without"
)
_CONNECTIVES = _words(
    "and or but nor so because although though if unless when whenever where while whether who whom whose which what"
    " why how whatever given based using assuming suppose according considering"
)
_AUXILIARIES = _words(
    "is are was were be been am do does did has have had can could will would shall should may might must cannot"
)
_NO_OBJECT = _words(
    "more less very too not only just also then again twice once here there now today tonight yes true false shorter"
    " longer simpler better easier clearer following rest same first last"
)
_LEAD_INS = _words("please kindly now then next also first finally just again and")
_PARTICLES = _words("out up down off back apart together aside")
_TAKES_TWO_OBJECTS = _words("give tell show teach send offer write ask hand grant lend")
_VERBS_LIKE_ADVERBS = _words("apply reply supply multiply imply rely comply fly")
_VERBS_LIKE_PARTICIPLES = _words("bring sing ring string embed need feed seed proceed speed shed")
_VERBS_LIKE_PLURALS = _words("focus canvas")
_NOUNS_LIKE_PARTICIPLES = _words(
    "meaning meeting heading writing building saying ending spelling beginning feeling wording reasoning opening"
    " setting rating painting training marketing"
)
_NOUNS_LIKE_ADVERBS = _words("reply supply family assembly anomaly butterfly monopoly ally fly")
_STOPS = _PREPOSITIONS | _CONNECTIVES | _AUXILIARIES | _PRONOUNS | _NO_OBJECT
_PHRASE_ENDS = _STOPS | _DETERMINERS
_GOVERNED = _DETERMINERS | (_PREPOSITIONS - {"of"})  # what follows a participle that is no noun
_NOT_A_VERB = (_PRONOUNS | _DETERMINERS | _CONNECTIVES | _AUXILIARIES | _PREPOSITIONS | _NO_OBJECT) - _words(
    "like do rest"
)
_PREFACES = (_PREPOSITIONS | _CONNECTIVES) - _words("who whom whose which what why how like")
_IRREGULAR = {
    "people": "person", "children": "child", "men": "man", "women": "woman", "criteria": "criterion",
    "phenomena": "phenomenon", "analyses": "analysis", "hypotheses": "hypothesis", "indices": "index",
    "movies": "movie", "cookies": "cookie", "lives": "life", "series": "series", "news": "news", "bias": "bias",
    "canvas": "canvas", "gas": "gas", "lens": "lens", "atlas": "atlas",
}  # fmt: skip


@dataclass(frozen=True)
class Verbs:
    """The commonest verbs of a dataset, each with its commonest objects, both in falling order."""

    pairs: dict[str, dict[str, int]]
    num_found: int  # instructions with a verb and an object
    num_instructions: int

    @property
    def num_shown(self) -> int:
        """Instructions behind `pairs`."""
        return sum(sum(objects.values()) for objects in self.pairs.values())


def count_verbs(instructions: Iterable[str], num_verbs: int = 20, num_objects: int = 4) -> Verbs:
    """The top verbs with their top objects. The paper's figure shows 20 and 4; ties go by the alphabet."""
    total = 0
    found: Counter[tuple[str, str]] = Counter()
    for instruction in instructions:
        total += 1
        pair = verb_and_object(instruction)
        if pair is not None:
            found[pair] += 1
    verbs: Counter[str] = Counter()
    for (verb, _), count in found.items():
        verbs[verb] += count
    top = {verb: {n: c for (v, n), c in found.items() if v == verb} for verb in _top(verbs, num_verbs)}
    return Verbs({verb: _top(objects, num_objects) for verb, objects in top.items()}, found.total(), total)


def verb_and_object(instruction: str) -> tuple[str, str] | None:
    """The verb of the first imperative sentence and the head of its object, lower case and singular.

    None for questions and statements, and where the verb has no noun as its object ("Explain why ...").
    """
    for sentence in _SENTENCE_END.split(instruction[:MAX_CHARACTERS]):
        plain = _POLITE.sub("", sentence.strip())
        if sentence.endswith("?") and plain == sentence:
            continue
        tokens = _TOKEN.findall(plain.lower().replace("\u2019", "'"))
        start = _verb_index(tokens)
        if start is not None:
            head = _object_head(tokens[start], tokens[start + 1 :])
            return (tokens[start], _singular(head)) if head is not None else None
    return None


def _top(counts: Counter[str] | dict[str, int], size: int) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:size])


def _verb_index(tokens: list[str]) -> int | None:
    """Where an imperative's verb stands: first, but for lead-ins ("please") and prefaces up to a comma ("If ...,")."""
    index = 0
    while index < len(tokens):
        word = tokens[index]
        if word in _LEAD_INS or (word.endswith("ly") and word not in _VERBS_LIKE_ADVERBS) or word == ",":
            index += 1
        elif word in _PREFACES or _is_participle(word):
            if "," not in tokens[index:]:
                return None
            index = tokens.index(",", index) + 1
        else:
            return index if _is_verb(tokens, index) else None
    return None


def _is_participle(word: str) -> bool:
    return word.endswith(("ing", "ed")) and word not in _VERBS_LIKE_PARTICIPLES and len(word) > 4


def _is_verb(tokens: list[str], index: int) -> bool:
    """Whether a word that opens a sentence is its verb, not the beginning of its subject."""
    word, after = tokens[index], tokens[index + 1 : index + 2]
    plural = word.endswith("s") and not word.endswith("ss") and word not in _VERBS_LIKE_PLURALS
    if not word[0].isalpha() or len(word) < 2 or "'" in word or plural or word in _NOT_A_VERB:
        return False
    return not after or (after[0] not in _AUXILIARIES and after[0] != ":")


def _object_head(verb: str, tokens: list[str]) -> str | None:
    """The last word of the first noun phrase, or None. A second one wins after "give" ("Give the dog a name")."""
    phrase: list[str] = []
    for index, word in enumerate(tokens):
        after = tokens[index + 1] if index + 1 < len(tokens) else ""
        if phrase and word in ("a", "an", "the", "some") and verb in _TAKES_TWO_OBJECTS:
            phrase = []
        elif (not phrase and _opens_phrase(word, index)) or _joins_adjectives(tokens[:index], word, after):
            continue
        elif _ends_phrase(word, phrase, after):
            break
        else:
            phrase.append(word)
    while len(phrase) > 1 and phrase[-1].endswith("ed") and phrase[-1] not in _VERBS_LIKE_PARTICIPLES:
        phrase.pop()  # "the skills required"
    head = phrase[-1] if phrase else ""
    return head if len(head) > 1 and head[0].isalpha() else None


def _opens_phrase(word: str, index: int) -> bool:
    """Whether a word may stand between a verb and its object: "out", "me", "the", "following", "carefully"."""
    beside_the_verb = index < 2 and (word in _PARTICLES or word in ("me", "us"))
    return beside_the_verb or word in _DETERMINERS or word == "following" or _is_adverb(word)


def _joins_adjectives(before: list[str], word: str, after: str) -> bool:
    """Whether a comma stands as in "a short, plain answer"; in "a poem, a song" it ends the phrase."""
    return word == "," and before[-2:-1] in (["a"], ["an"]) and after not in _PHRASE_ENDS


def _ends_phrase(word: str, phrase: list[str], after: str) -> bool:
    if not word[0].isalnum() or word in _PHRASE_ENDS or (phrase and word in _PARTICLES):
        return True
    if _is_adverb(word):
        return True
    # "a list containing the names", but "the pupil's working" and "a packing list"
    governs = not after or after in _GOVERNED
    participle = word.endswith("ing") and word not in _NOUNS_LIKE_PARTICIPLES
    return participle and bool(phrase) and governs and not phrase[-1].endswith("'s")


def _is_adverb(word: str) -> bool:
    return word.endswith("ly") and word not in _NOUNS_LIKE_ADVERBS


def _singular(noun: str) -> str:
    noun = noun.removesuffix("'s")
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith("ies") and len(noun) > 4:
        return noun[:-3] + "y"
    if noun.endswith(("sses", "shes", "ches", "xes", "zzes")):
        return noun[:-2]
    return noun[:-1] if noun.endswith("s") and not noun.endswith(("ss", "us", "is")) else noun
