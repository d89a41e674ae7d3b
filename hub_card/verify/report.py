"""What was found, printed as it is found."""

from collections import Counter

MARKS = {"right": "right   ", "wrong": "WRONG   ", "unchecked": "not checked", "note": "note    "}


class Report:
    """Findings of four kinds; `wrong` ones decide the exit code."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []

    def _add(self, kind: str, text: str) -> None:
        self.found.append((kind, text))
        print(f"{MARKS[kind]:<12}{text}", flush=True)

    def right(self, text: str) -> None:
        """Something is as it should be."""
        self._add("right", text)

    def wrong(self, text: str) -> None:
        """Something isn't."""
        self._add("wrong", text)

    def unchecked(self, text: str) -> None:
        """Something couldn't be looked at; the text says why."""
        self._add("unchecked", text)

    def note(self, text: str) -> None:
        """Worth knowing, and neither right nor wrong."""
        self._add("note", text)

    def judge(self, is_right: bool, text: str) -> bool:
        """`right` or `wrong`; returns `is_right`."""
        (self.right if is_right else self.wrong)(text)
        return is_right

    def texts(self, kind: str) -> list[str]:
        """The findings of one kind."""
        return [text for found, text in self.found if found == kind]

    def close(self) -> int:
        """Print the summary; returns the exit code."""
        count = Counter(kind for kind, _ in self.found)
        print(f"\n{count['right']} right, {count['wrong']} wrong, {count['unchecked']} not checked")
        return 1 if count["wrong"] else 0


__all__ = ["Report"]
