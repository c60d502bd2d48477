#!/bin/sh
# Two minutes on two cores: text -> tokenizer -> token store -> an encoder on two processes -> answers that can be
# checked. Every command is printed before it runs, as one types it in the folder of the project:
#     source .venv/bin/activate; sh sample_data/demo.sh
# WORLD=en before it, or `make demo WORLD=en`, is the same in English.
set -e
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1  # two processes of one thread, also where there are more cores or a GPU
run() { printf '\n$ %s\n' "$*"; "$@"; }
case ${WORLD:-ja} in
    ja) text="demo_output/world/corpus.txt sample_data/articles.txt" words="" ;;
    en) text="demo_output/world/corpus.txt" words="--word_tokenizer whitespace" ;;
    *) echo "WORLD is ja or en, not $WORLD" >&2; exit 2 ;;
esac

(mkdir -p demo_output; cd demo_output; rm -rf world tokenizer store encoder plain)
run python sample_data/world.py --output_dir demo_output/world --language ${WORLD:-ja} --megabytes 1.5 \
    --people 6 --towns 4 --goods 1 --things 8
run python scripts/train_tokenizer.py --input_file $text --model_dir demo_output/tokenizer $words --vocab_size 4096
run python scripts/prepare_corpus.py --input_file $text \
    --tokenizer_dir demo_output/tokenizer --output_dir demo_output/store
run accelerate launch --config_file accelerate_configs/cpu_2proc.yaml scripts/run_pretraining.py \
    --config recipes/demo.yaml
run python sample_data/plain_way.py --like demo_output/encoder --output_dir demo_output/plain --text $text
run python sample_data/ask.py demo_output/encoder/final demo_output/world/questions.jsonl --beside demo_output/plain

cat <<'END'

"said so": the question's own sentence is in the text; "said otherwise": the fact is, in other words only; "worked out":
it only follows from others (a mother's mother, a price times a number), and such a small model seldom gets it.
"right" is the model, "beside" what transformers' Trainer made of the same text in the same seconds.
`make tour` (ten minutes) learns a larger world, with a larger model, and with a GPT-2.

world       demo_output/world           corpus.txt is what was read, questions.jsonl what is asked
tokenizer   demo_output/tokenizer       tokenizer_report.json says how it cuts the text
token store demo_output/store           look inside: python scripts/prepare_corpus.py --inspect demo_output/store
model       demo_output/encoder/final   its README.md is the model card
curves      demo_output/encoder/curves.png, the numbers in log.jsonl; tensorboard --logdir demo_output/encoder

On your own corpus, one sentence a line and a blank line between documents (source .venv/bin/activate first):
  python scripts/train_tokenizer.py --input_file corpus.txt --model_dir tokenizer
  python scripts/prepare_corpus.py --input_file corpus.txt --tokenizer_dir tokenizer --output_dir store
  accelerate launch --config_file accelerate_configs/gpu1_bf16.yaml scripts/run_pretraining.py \
    --dataset_dir store --model_dir runs/bert --model_type bert-small --do_whole_word_mask
END
