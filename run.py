"""`python run.py --config configs/demo.yaml [--model.… --data.… --trainer.…]` makes a run."""

from lightning_modules.cli import run

if __name__ == "__main__":
    run()
