//! The promises of Spanbuf, each tested on real parts: see the files beside this one.
