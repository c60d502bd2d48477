#!/bin/sh
# Ten minutes on two cores: an encoder and a GPT-2 of three million parameters learn an invented world, and
# are asked about it; beside each what transformers' Trainer makes of the same text in the same seconds.
# Every command is printed before it runs, as one types it in the folder of the project:
#     source .venv/bin/activate; sh sample_data/tour.sh
# WORLD=en before it, or `make tour WORLD=en`, is the same in English.
set -e
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1  # two processes of one thread, also where there are more cores or a GPU
run() { printf '\n$ %s\n' "$*"; "$@"; }
case ${WORLD:-ja} in
    ja) text="tour_output/world/corpus.txt sample_data/articles.txt" words="" ;;
    en) text="tour_output/world/corpus.txt" words="--word_tokenizer whitespace" ;;
    *) echo "WORLD is ja or en, not $WORLD" >&2; exit 2 ;;
esac

rm -rf tour_output
run python sample_data/world.py --output_dir tour_output/world --language ${WORLD:-ja} --megabytes 5 \
    --people 8 --towns 5 --goods 2 --things 8

echo; echo "An encoder: it sees a sentence with some words masked, and learns to say what they were."
run python scripts/train_tokenizer.py --input_file $text --model_dir tour_output/tokenizer $words --vocab_size 4096
run python scripts/prepare_corpus.py --input_file $text \
    --tokenizer_dir tour_output/tokenizer --output_dir tour_output/store
run accelerate launch --config_file accelerate_configs/cpu_2proc.yaml scripts/run_pretraining.py \
    --config recipes/tour_encoder.yaml
run python sample_data/plain_way.py --like tour_output/encoder --output_dir tour_output/plain_encoder --text $text
run python sample_data/ask.py tour_output/encoder/final tour_output/world/questions.jsonl \
    --beside tour_output/plain_encoder --output_file tour_output/encoder_answers.jsonl

echo; echo "A GPT-2: it reads from left to right, and learns to say what comes next. Its tokenizer loses nothing."
run python scripts/train_tokenizer.py --objective causal --vocab_size 2048 --input_file $text \
    --model_dir tour_output/gpt2_tokenizer
run python scripts/prepare_corpus.py --input_file $text \
    --tokenizer_dir tour_output/gpt2_tokenizer --output_dir tour_output/gpt2_store
run accelerate launch --config_file accelerate_configs/cpu_2proc.yaml scripts/run_pretraining.py \
    --config recipes/tour_gpt2.yaml
run python sample_data/plain_way.py --like tour_output/gpt2 --output_dir tour_output/plain_gpt2 --text $text
run python sample_data/ask.py tour_output/gpt2/final tour_output/world/questions.jsonl \
    --beside tour_output/plain_gpt2 --output_file tour_output/gpt2_answers.jsonl

cat <<'END'

"said so": the question's own sentence is in the text; "said otherwise": the fact is, in other words only; "worked out":
it only follows from others (a mother's mother, a price times a number). "right" is the model, "beside" the plain way.

world    tour_output/world                      corpus.txt is what was read, questions.jsonl what is asked
models   tour_output/encoder/final, tour_output/gpt2/final     with a model card; plain_encoder, plain_gpt2 beside them
curves   curves.png and log.jsonl in tour_output/encoder and tour_output/gpt2; tensorboard --logdir tour_output
answers  tour_output/encoder_answers.jsonl, tour_output/gpt2_answers.jsonl

What to try next:
  - copy recipes/tour_encoder.yaml, change one line (max_steps, learning_rate, optimizer, mask_probability), run it again
  - a larger world: --people 80 --towns 16 --goods 10 --things 16
  - kill a run in the middle and give its command again with --do_continue: the same answers
  - your own text: README.md, "Your own corpus"
END
