//! Library of the development tasks, so that the end-to-end tests drive the same lab as the commands.
