from evals.run import main
from runtime import cli

if __name__ == "__main__":
    cli.run(main)
