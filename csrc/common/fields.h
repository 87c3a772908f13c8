// The fields of a parameter struct by name, so that bindings.cpp can fill it from Python.
#pragma once

// Inside the struct: all its fields, in any order.
#define GRPO_FIELDS(...)                                   \
  static constexpr const char* kFieldNames = #__VA_ARGS__; \
  template <class Use>                                     \
  void with_fields(Use use) {                              \
    use(__VA_ARGS__);                                      \
  }
