"""Scripts whose end is known: those that must succeed, and those that must refuse what they are given."""


def done(script, main, *argv) -> str:
    """Runs a script, by the fixture `script`, that must succeed; returns its output."""
    status, out, err = script(main, *argv)
    assert status == 0, err
    return out


def refusal(script, main, *argv) -> str:
    """Runs a script that must end with status 2 and one line; returns that line."""
    status, _, err = script(main, *argv)
    assert status == 2 and err.count("\n") == 1, (status, err)
    return err
