"""The forms in which models write experts: each file knows one, and proposes blocks for it."""
