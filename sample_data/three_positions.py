"""What a policy has learnt, in a sentence, and three of its answers in words.

python sample_data/three_positions.py RESULT_OF_EVALUATE RECORDS ANSWERS_OF_PREDICT SCHEMA "the rule in words"
"""

import json
import sys
import textwrap
from pathlib import Path

from lmscripts.data.schema import load_schema

result_file, records, answers, schema_name, rule = sys.argv[1:]
schema = load_schema(schema_name)
result = json.loads(Path(result_file).read_text(encoding="utf-8"))
metrics = result["metrics"]
print(
    f"\nThe rule was to {rule}. Of {result['counts']['decisions']:,} decisions that it had never seen the policy "
    f"foresaw {metrics['top1_accuracy']:.1%}; who guesses is right in {metrics['chance_accuracy']:.1%}."
)

for line, answer in zip(*(Path(name).read_text(encoding="utf-8").splitlines() for name in (records, answers))):
    print()
    for field, text in zip(schema.fields, line.split("\t")):
        numbers = text.split(",")
        if field.kind in ("set", "sequence"):
            said = ", ".join(schema.words(field, int(number)) for number in numbers)
        elif field.kind == "numeric":
            said = ", ".join(f"{name} {number}" for name, number in zip(field.names, numbers))
        else:
            continue
        print(textwrap.fill(f"{field.name}: {said}", 118, max_lines=5, subsequent_indent="  ", placeholder=" ..."))
    content = json.loads(answer)
    for each in content["candidates"][:3]:
        chosen = "   <- what was chosen" if each["candidate"] == content["chosen"] else ""
        print(f"  {each['probability']:>6.1%}  {each['words']}{chosen}")
