"""Settings from a file are checked: each has a rule, and the defaults keep it."""

from dataclasses import asdict, fields

from tinyunet.common.schema import record
from tinyunet.training.settings import RULES, Settings


def test_every_setting_has_a_rule():
    assert RULES.keys() == {field.name for field in fields(Settings)}
    record(RULES)(asdict(Settings()), "settings")
