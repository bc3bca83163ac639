"""Where does it go? Links, placement and dispatch: no weights, no Ray, no HTTP."""
