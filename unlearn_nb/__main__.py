"`python -m unlearn_nb` is the command `unlearn_nb`."
from unlearn_nb.cli import main

if __name__ == '__main__': main()
