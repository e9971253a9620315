"""The answers so far, on disk: what was paid for is not asked again."""

import fcntl
import json
from contextlib import suppress
from pathlib import Path

from labelling.endpoint import Answer, Question
from runtime.sources import UserError


class Journal:
    """A json object a line, written answer by answer; a line that a kill cut off is dropped."""

    def __init__(self, path: Path):
        """Read the journal, which need not exist, and lock it for writing.

        Raises UserError for a whole line that cannot be read, and if another process writes to it.
        """
        self.answers: dict[str, Answer] = {}
        self._path = path
        try:
            if path.exists() and not path.is_file():
                raise UserError(f"{path}: a journal was expected, this is not a regular file.")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            self._file.truncate(self._read())
        except BlockingIOError:
            raise UserError(f"{path}: another run is writing to this journal.") from None
        except OSError as e:
            raise UserError(f"{path}: the journal cannot be opened ({e.strerror}).") from e

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        """Close it; without an answer no file is left behind."""
        if not self.answers:
            self._path.unlink(missing_ok=True)
        with suppress(OSError):  # an answer that did not fit is still buffered, and was reported
            self._file.close()

    def write(self, question: Question, judge: str, answer: Answer) -> None:
        """Append an answer. Raises UserError where it cannot be written."""
        row = question._asdict() | {"judge": judge} | answer._asdict()
        del row["messages"]
        try:
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()
        except OSError as e:
            raise UserError(f"{self._path}: cannot be written ({e.strerror}).") from e
        self.answers[question.key] = answer

    def tokens(self) -> tuple[int, int]:
        """Prompt tokens and answered tokens of all answers."""
        answers = self.answers.values()
        return sum(a.tokens_in for a in answers), sum(a.tokens_out for a in answers)

    def _read(self) -> int:
        """Read the answers; returns the bytes of whole lines."""
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                row = json.loads(line)
                self.answers[row["key"]] = Answer(*(row[name] for name in Answer._fields))
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise UserError(f"{self._path}: line {number} is not an answer.") from e
        return whole
