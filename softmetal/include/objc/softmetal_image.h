// Tells the runtime about the classes, selectors, protocols and categories of the program or shared
// library that this header is compiled into. The compiler puts them into ELF sections whose bounds
// the linker names; they differ for each program or library, hence a constructor in each.
#pragma once

struct softmetal_objc_image {
  void **classes, **classes_end;
  void **load_classes, **load_classes_end;
  void **categories, **categories_end;
  void **load_categories, **load_categories_end;
  void **selectors, **selectors_end;
  void **protocols, **protocols_end;
  void **protocol_references, **protocol_references_end;
};

#ifdef __cplusplus
extern "C" {
#endif
// Does nothing for an image that it knows.
__attribute__((visibility("default"))) void softmetal_objc_register_image(
    const struct softmetal_objc_image*);

#define SOFTMETAL_OBJC_SECTION(name)                                         \
  extern __attribute__((weak, visibility("hidden"))) void* __start_##name[]; \
  extern __attribute__((weak, visibility("hidden"))) void* __stop_##name[];
SOFTMETAL_OBJC_SECTION(objc_classlist)
SOFTMETAL_OBJC_SECTION(objc_nlclslist)
SOFTMETAL_OBJC_SECTION(objc_catlist)
SOFTMETAL_OBJC_SECTION(objc_nlcatlist)
SOFTMETAL_OBJC_SECTION(objc_selrefs)
SOFTMETAL_OBJC_SECTION(objc_protolist)
SOFTMETAL_OBJC_SECTION(objc_protorefs)
#undef SOFTMETAL_OBJC_SECTION
#ifdef __cplusplus
}
#endif

// Before any C++ static initialiser, which may already send messages.
__attribute__((constructor(101))) static void softmetal_objc_register_this_image(void) {
  const struct softmetal_objc_image image = {
      __start_objc_classlist, __stop_objc_classlist,  //
      __start_objc_nlclslist, __stop_objc_nlclslist,  //
      __start_objc_catlist,   __stop_objc_catlist,    //
      __start_objc_nlcatlist, __stop_objc_nlcatlist,  //
      __start_objc_selrefs,   __stop_objc_selrefs,    //
      __start_objc_protolist, __stop_objc_protolist,  //
      __start_objc_protorefs, __stop_objc_protorefs,
  };
  softmetal_objc_register_image(&image);
}
