"""The state of an optimizer, grown by the plan that grows its model."""
