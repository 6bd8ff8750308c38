// The prelude has what this header declares.
