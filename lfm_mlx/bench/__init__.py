"""One file per question asked of the machine; each ends in one JSON line.

Nothing is imported here: a question that watches the process' memory is not to carry the others.
"""
