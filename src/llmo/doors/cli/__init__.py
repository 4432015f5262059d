"""The command line: parse, call the API of this process or of a server, show the answer."""
