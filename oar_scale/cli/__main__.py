from oar_scale.cli import command

command()
