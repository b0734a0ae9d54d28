"""Personal data and secrets: recognised by form and check digits; what is set aside for examples passes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_ray.generate.privacy import holds_personal_data, holds_secret


@pytest.mark.parametrize(
    "text",
    [
        "Write to jane.doe+news@mail.contoso.co.uk.",
        "<a href='mailto:info@acme.io'>",
        "Call (212) 736-5000 today",
        "Tel. 212-736-5000, ext. 3",
        "212.736.5000",
        "+1 212 736 5000",
        "1-800-275-2273",
        "+49 30 1234567",
        "+44 (0)20 7123 4567",
        "+491701234567",
        "card 4111 1111 1111 1111",
        "4111111111111111",
        "3782-822463-10005",
        "5555-5555-5555-4444",
        "DE89 3704 0044 0532 0130 00",
        "GB82WEST12345698765432",
        "SSN: 219-09-9999",
    ],
)
def test_personal_data_is_found(text: str) -> None:
    assert holds_personal_data(text)
    assert holds_personal_data(f"Dear all,\n\nsee below.\n{text}\n\nYours")


@pytest.mark.parametrize(
    "text",
    [
        # set aside for examples
        "jane@example.com", "jane@mail.example.org", "admin@shop.test", "x@example", "me@localhost",
        "(212) 555-0123", "+1-415-555-0199", "(123) 456-7890", "555-123-4567", "123-456-7890", "(555) 123-4567",
        # no address
        "@property", "user@host", "git@github.com:org/repo.git", "a @ b.com", "5 apples @ 2.50",
        # other numbers
        "In 1989-1990 there were 12,345,678 people.", "2020-01-05", "3.14159265358979323846", "+12", "5+12345678",
        "978-3-16-148410-0", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16", "1234 5678 9012 3456",
        "4111 1111 1111 1112", "9999999999999995", "DE89 3704 0044 0532 0130 01", "AB12 CDEF 3456 GHIJ", "000-12-3456",
        "900-12-3456", "666-12-3456", "123-45-678", "192.168.100.200", "10:30-11:45", "f(x) = 212 - 736",
        "10 000 000 000",
        "Order 212-736-50001", "ISO 8601:2019-02-28T12:00:00+01:00",
    ],
)  # fmt: skip
def test_other_text_is_no_personal_data(text: str) -> None:
    assert not holds_personal_data(text)


@settings(deadline=None, max_examples=100)
@given(st.from_regex(r"4[0-9]{14}", fullmatch=True))
def test_exactly_one_of_ten_check_digits_makes_a_card_number(digits: str) -> None:
    assert sum(holds_personal_data(digits + check) for check in "0123456789") == 1


@settings(deadline=None, max_examples=100)
@given(st.from_regex(r"[0-9]{18}", fullmatch=True))
def test_exactly_one_pair_of_check_digits_makes_an_iban(account: str) -> None:
    valid = [check for check in range(2, 99) if holds_personal_data(f"DE{check:02d}{account}")]
    assert len(valid) == 1


KEY = "".join(random.Random(0).choices("abcdefghijkmnopqrstuvwxyzABCDEFGH23456789", k=48))


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE",
        "-----BEGIN PRIVATE KEY-----",
        "-----BEGIN PGP PRIVATE KEY BLOCK-----",
        "AKIAQWERTYUIOPASDFGH",
        f"ghp_{KEY[:36]}",
        f"github_pat_{KEY}",
        f"xoxb-{KEY[:24]}",
        f"sk-{KEY}",
        f"sk-proj-{KEY}",
        f"eyJ{KEY[:20]}.eyJ{KEY[:30]}.{KEY[:40]}",
        "password = 'Tr0ub4dor&3'",
        "PASSWORD: hunter2isgone",
        'api_key="9f8c7b6a5d4e3f2a1b0c"',
    ],
)
def test_a_secret_is_found(text: str) -> None:
    assert holds_secret(text)
    assert holds_secret(f"Use this:\n    {text}\n")


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN PUBLIC KEY-----", "-----BEGIN CERTIFICATE-----", "AKIAIOSFODNN7EXAMPLE", "AKIA", "ghp_short",
        "sk-learn",
        "task-oriented-dialogue-systems-in-practice", "sk-ip-this-very-long-hyphenated-word", "eyJhbGciOiJIUzI1NiJ9",
        'password = input("Password: ")', "password = get_password()", 'password="your_password1"', "password: string",
        "Password: at least 12 characters", "password = '********'", "password = os.environ['DB_PASSWORD']",
        "A strong password mixes letters and digits.", "api_key = YOUR_API_KEY_1", "api_key=${API_KEY_2}", "pwd",
        "password = password123", "api key: <insert-key-1>",
    ],
)  # fmt: skip
def test_other_text_holds_no_secret(text: str) -> None:
    assert not holds_secret(text)


@settings(deadline=None, max_examples=200)
@given(st.text() | st.text("0123456789 -.()+@abDE=:'"))
def test_no_text_is_a_failure(text: str) -> None:
    assert isinstance(holds_personal_data(text), bool)
    assert isinstance(holds_secret(text), bool)
