"""Make rows of the thumbs of a chat UI: the feedback that Open WebUI exports, in feedback.json.

    python data/thumbs.py feedback.json > ratings.jsonl
    python data/thumbs.py feedback.json 0.99 > ratings.jsonl    # thumbs-up are not imitated

Each rated answer becomes a row: the conversation up to it, and its label. A thumbs-down has label
0. A thumbs-up has label 1, or the number given; README.md says when 0.99 is better ("Which data to
collect"). Feedback without a rating, or without its conversation, is left out and counted.
"""

import json
import sys
from pathlib import Path


def rows_of(feedback, thumbs_up):
    """The rows of a list of ratings, and the number of those that were left out."""
    rows, left_out = [], 0
    for rated in feedback:
        rating = (rated.get("data") or {}).get("rating")
        if not rated.get("snapshot") or not rating:
            left_out += 1
            continue
        messages = rated["snapshot"]["chat"]["chat"]["history"]["messages"]
        chat = conversation(messages, rated["meta"]["message_id"])
        rows.append({"completion": chat, "label": thumbs_up if rating > 0 else 0})
    return rows, left_out


def conversation(messages, name):
    """The messages from the first question to the one of this name."""
    chat = []
    while name:
        message = messages[name]
        chat.insert(0, {"role": message["role"], "content": message["content"]})
        name = message["parentId"]
    return chat


if __name__ == "__main__":
    file, *label = sys.argv[1:]
    feedback = json.loads(Path(file).read_text(encoding="utf-8"))
    rows, left_out = rows_of(feedback, float(label[0]) if label else 1)
    for row in rows:
        print(json.dumps(row))
    print(f"{len(rows)} rows; {left_out} left out", file=sys.stderr)
