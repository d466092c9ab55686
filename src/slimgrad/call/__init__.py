"""From a call of a public function to a program of chunks."""
