"""What a person sees in a terminal: chat and status, over HTTP."""
