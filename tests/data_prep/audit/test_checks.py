import json

from data_prep.audit.checks import CHECKS, ERROR, KEPT, LEVELS, RULES, Offence, Tally


def test_checks_have_one_name_each_and_rules_only_warn() -> None:
    assert len(LEVELS) == len(CHECKS)
    assert {LEVELS[rule.name] for rule in RULES} == {"warning"}


def test_many_offenders_are_counted_and_the_first_are_kept() -> None:
    tally = Tally()
    for k in range(KEPT + 5):
        tally.fail("ct", f"v{k}", "is damaged")
    other = Tally()
    other.saw("ct", 100)
    other.fail("masks", "w", "is damaged")
    other.add(tally)
    assert (other.failed["ct"], other.checked["ct"]) == (KEPT + 5, 100)
    assert other.offences["ct"] == [Offence("ct", f"v{k}", "is damaged") for k in range(KEPT)]
    assert other.offences["masks"] == [Offence("masks", "w", "is damaged")]


def test_only_errors_make_shards_unfit() -> None:
    tally = Tally()
    tally.saw("spine", 4)
    tally.fail("spine", "v", "in front")
    assert not tally.has_errors
    tally.fail("leak", "v", "twice")
    assert tally.has_errors


def test_rows_say_what_held_what_did_not_and_what_was_not_asked() -> None:
    tally = Tally()
    tally.saw("checksums", 7)
    tally.saw("spine", 3)
    tally.fail("spine", "v", "in front")
    rows = {row["name"]: row for row in json.loads(json.dumps(tally.as_rows()))}
    assert list(rows) == [check.name for check in CHECKS]
    assert (rows["checksums"]["status"], rows["checksums"]["level"]) == ("passed", ERROR)
    assert rows["spine"]["offenders"] == [{"where": "v", "what": "in front"}]
    assert (rows["spine"]["status"], rows["spine"]["checked"], rows["spine"]["failed"]) == ("failed", 3, 1)
    assert rows["masks"]["status"] == "not applicable"
