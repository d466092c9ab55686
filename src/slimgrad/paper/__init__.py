"""The paper's experiments as a programme that resumes point by point, and its report."""
