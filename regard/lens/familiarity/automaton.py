"""Has a text of tokens said one of several phrases yet? An Aho-Corasick automaton over token ids.

A state is how much of a phrase stands at the end of the text; `SAID` is reached with the last token of a
phrase and never left. Source of the automaton: Aho and Corasick, 1975.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from regard.errors import RegardError

SAID, START = -1, 0


class Phrases:
    """Several phrases, any of which will do.

    Args:
        phrases: token ids of each; empty ones are not allowed.

    Attributes:
        longest: tokens of the longest one.
        left: at each state, how many further tokens complete a phrase at least.

    Raises:
        RegardError: for no phrase, or one without tokens.

    Example:
        >>> phrases = Phrases([[1, 2, 3], [2, 4]])
        >>> state = phrases.after(phrases.after(START, 1), 2)
        >>> phrases.left[state], phrases.after(state, 4) == SAID
        (1, True)
    """

    def __init__(self, phrases: Iterable[Sequence[int]]) -> None:
        found = sorted({tuple(int(token) for token in phrase) for phrase in phrases})
        if not found or not found[0]:
            raise RegardError("a phrase to look for must have at least one token.")
        self.longest = max(map(len, found))
        self._next: list[dict[int, int]] = [{}]
        self._ends: list[bool] = [False]
        for phrase in found:
            self._add(phrase)
        self._fall = self._falls()
        self.left = self._distances()

    def after(self, state: int, token: int) -> int:
        """Return the state after one more token."""
        if state == SAID:
            return SAID
        while state and token not in self._next[state]:
            state = self._fall[state]
        state = self._next[state].get(token, START)
        return SAID if self._ends[state] else state

    def onward(self, state: int) -> set[int]:
        """Return the tokens that go on with a phrase, or begin one."""
        found: set[int] = set()
        while state:
            found |= self._next[state].keys()
            state = self._fall[state]
        return found | self._next[START].keys()

    def _add(self, phrase: Sequence[int]) -> None:
        state = START
        for token in phrase:
            if token not in self._next[state]:
                self._next[state][token] = len(self._next)
                self._next.append({})
                self._ends.append(False)
            state = self._next[state][token]
        self._ends[state] = True

    def _falls(self) -> list[int]:
        """The longest other beginning of a phrase that each state ends with; marks states that end one."""
        falls = [START] * len(self._next)
        waiting = deque(self._next[START].values())
        while waiting:
            state = waiting.popleft()
            for token, after in self._next[state].items():
                back = falls[state]
                while back and token not in self._next[back]:
                    back = falls[back]
                falls[after] = self._next[back].get(token, START)
                self._ends[after] |= self._ends[falls[after]]
                waiting.append(after)
        return falls

    def _distances(self) -> list[int]:
        own = [0] * len(self._next)
        for state in reversed(range(len(self._next))):  # children were added after their parents
            if not self._ends[state]:
                own[state] = 1 + min(own[after] for after in self._next[state].values())
        found = [own[START]] * len(own)
        for state in range(1, len(own)):
            place = state
            while place:
                found[state] = min(found[state], own[place])
                place = self._fall[place]
        return found
