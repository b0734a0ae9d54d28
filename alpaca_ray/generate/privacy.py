"""Personal data and secrets in text: recognised by form and check digits, so that nothing has to be looked up.

Strict on purpose: whether an address is made up cannot be seen, and a dataset that is given away must hold none. What
standards set aside for examples passes: the domains of RFC 2606, US numbers 555-01xx, area codes that do not exist.
"""

import re

_EMAIL = re.compile(
    r"(?<![\w.+%-])(?!git@)[\w.+%-]{1,64}@(?P<domain>[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,})\b"
)
_EXAMPLE_DOMAIN = re.compile(
    r"(?:.+\.)?(?:example(?:\.(?:com|org|net|edu))?|[\w-]+\.(?:test|example|invalid|localhost))"
)

# NANP: neither an area code nor an exchange begins with 0 or 1, and no area code is 555.
_US_PHONE = re.compile(
    r"""(?<![\w.+-]) (?:\+?1[ .-]?)? (?: \((?P<area>[2-9]\d\d)\)[ ]? | (?P<area_2>[2-9]\d\d)[ .-] )
    (?P<exchange>[2-9]\d\d) [ .-] (?P<line>\d{4}) (?![\w-]|\.\d)""",
    re.VERBOSE,
)
# E.164: a country code and at most 15 digits in all. Those of +1 are the numbers above.
_INTERNATIONAL_PHONE = re.compile(r"(?<![\w+])\+(?!1[ .(-]?)[1-9]\d{0,2}(?:[ .-]?\(?\d{1,5}\)?){2,6}(?!\w)")

_CARD = re.compile(
    r"(?<![\w.-])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}|3[47]\d{2}([ -]?)\d{6}\2\d{5}|3[068]\d{12})(?![\w-]|\.\d)"
)
_CARD_PREFIX = re.compile(r"4|5[1-5]|2[2-7]|3[47]|6(?:011|5)|30[0-5]|3[68]")  # Visa, Mastercard, Amex, Discover, Diners
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_SSN = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")

_SECRETS = (
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    r"\b(?:AKIA|ASIA)(?![A-Z0-9]{9}EXAMPLE\b)[A-Z0-9]{16}\b",  # AWS; its manual's own example passes
    r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{22,}",
    r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",  # Slack
    r"\bsk-(?=[\w-]{0,60}\d)[A-Za-z0-9_-]{20,}",  # OpenAI and those who took over its form
    r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",  # a JSON web token
)
_SECRET = re.compile("|".join(_SECRETS))
_PASSWORD = re.compile(
    r"""\b(?:password|passwd|pwd|api[_ -]?key|secret[_ -]?key|access[_ -]?token|auth[_ -]?token)["']?\s*[:=]\s*
    (?P<quote>["'])?(?P<value>[^\s"',;<>(){}$]{8,64})(?(quote)["']|(?=[\s,;]|$))""",
    re.VERBOSE | re.IGNORECASE,
)
# Values that only stand for one.
_PLACEHOLDER = re.compile(
    r"pass|secret|your|my_?|example|sample|test|dummy|change|token|key|x{3}|\*{3}|\.\.|1234", re.I
)


def holds_personal_data(text: str) -> bool:
    """Whether there is an e-mail address, a telephone, card or US social security number, or an IBAN."""
    return (
        any(_EXAMPLE_DOMAIN.fullmatch(found["domain"].lower()) is None for found in _EMAIL.finditer(text))
        or _SSN.search(text) is not None
        or any(_is_phone(found) for found in _US_PHONE.finditer(text))
        or any(8 <= len(_digits(found[0])) <= 15 for found in _INTERNATIONAL_PHONE.finditer(text))
        or any(_is_card(_digits(found[0])) for found in _CARD.finditer(text))
        or any(_is_iban(found[0].replace(" ", "")) for found in _IBAN.finditer(text))
    )


def holds_secret(text: str) -> bool:
    """Whether there is a private key, an access token in a provider's form, or a password that is given a value."""
    return _SECRET.search(text) is not None or any(_is_password(found["value"]) for found in _PASSWORD.finditer(text))


def _is_phone(found: re.Match[str]) -> bool:
    area = found["area"] or found["area_2"]
    reserved = found["exchange"] == "555" and found["line"].startswith("01")
    return area != "555" and not reserved


def _is_card(digits: str) -> bool:
    """A known issuer's prefix and Luhn's check digit (ISO/IEC 7812-1)."""
    doubled = (int(digit) * 2 for digit in digits[-2::-2])
    checksum = sum(int(digit) for digit in digits[-1::-2]) + sum(value - 9 * (value > 9) for value in doubled)
    return checksum % 10 == 0 and _CARD_PREFIX.match(digits) is not None


def _is_iban(iban: str) -> bool:
    """ISO 13616: letters as 10 to 35, the first four characters at the end, remainder 1 by 97. The shortest has 15."""
    return len(iban) >= 15 and int("".join(str(int(char, 36)) for char in iban[4:] + iban[:4])) % 97 == 1


def _is_password(value: str) -> bool:
    """Letters and digits, and no stand-in: code and advice speak of passwords without giving one."""
    mixed = re.search(r"[A-Za-z]", value) and re.search(r"\d", value)
    return mixed is not None and _PLACEHOLDER.search(value) is None


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)
