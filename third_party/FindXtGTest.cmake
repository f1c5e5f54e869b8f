# Finds the system's GoogleTest and offers GTest::gtest_main. Never downloads: a machine without it is told what to install.
find_package(GTest CONFIG QUIET)
if(NOT TARGET GTest::gtest_main)
  find_package(GTest QUIET) # CMake's own module, for systems that ship no GTestConfig.cmake
endif()
if(NOT TARGET GTest::gtest_main)
  message(FATAL_ERROR "XT_TESTS=ON needs GoogleTest, which was not found. Install it with\n"
                      "  apt-get install libgtest-dev      (Debian, Ubuntu)\n"
                      "  dnf install gtest-devel           (Fedora)\n"
                      "or pass -DGTest_ROOT=<prefix>.")
endif()
set(XtGTest_FOUND TRUE)
