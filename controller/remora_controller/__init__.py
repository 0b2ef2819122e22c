"""Controller: enrolment, fleet state, rollouts, artifact repository, operator API and CLI."""
