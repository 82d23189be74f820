from engine.errors import run_main
from nmt.prepare.command import main

run_main(main)
