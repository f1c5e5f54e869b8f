from xtuner.nn.interleave import interleave


def test_runs_take_turns_from_pause_to_pause():
    log = []

    def run(name, pauses):
        for step in range(pauses):
            log.append(f"{name}{step}")
            yield
        log.append(f"{name} ends")
        return name

    assert interleave([run("a", 2), run("b", 1), run("c", 0)]) == ["a", "b", "c"]
    assert log == ["a0", "b0", "c ends", "a1", "b ends", "a ends"]
