"""Revisions, oldest first by number. A revision that was released is never edited: add another."""
